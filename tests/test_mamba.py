"Selective scan and Mamba layers: released numbers, the sequential reference, odd shapes."

import importlib.machinery
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from parity_cases import close
from unipre3d.backbones.backbone import match_released
from unipre3d.backbones.layers import spread
from unipre3d.backbones.mamba import (
    SSM,
    Mamba,
    MambaBlock,
    released_mamba_weight,
    selective_scan,
    selective_scan_reference,
)

PARITY = Path(__file__).parent / "parity"


def inputs(b=2, l=19, d=5, n=3, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    tensors = (
        r(b, l, d),
        F.softplus(r(b, l, d)),
        -torch.exp(r(d, n)),
        r(b, l, n),
        r(b, l, n),
        r(d),
    )
    return [x.to(device).requires_grad_() for x in tensors]


def value_and_grads(scan, tensors):
    y = scan(*tensors)
    return [
        y,
        *torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum(),
            tensors,
        ),
    ]


def load_layer(layer, state, prefix=""):
    layer.load_state_dict(
        match_released(layer.state_dict(), released_mamba_weight, state, prefix).weights
    )


def states(data):
    return {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}


def recorded_gradients(layer, data, prefix=""):
    recorded = match_released(
        dict(layer.named_parameters()), released_mamba_weight, data, "grad/state/" + prefix
    )
    for name, value in recorded.weights.items():
        close(layer.get_parameter(name).grad, value)
    assert not recorded.misfit
    return len(recorded.weights)


def test_parity_with_the_released_block():
    data = load_file(PARITY / "mamba_block_pcm.safetensors")
    block = MambaBlock(width=16)
    load_layer(block.mixer, states(data), "mixer.")
    block.norm.weight.data.copy_(data["state/norm.weight"])
    hidden, residual = (data[f"in/{k}"].clone().requires_grad_() for k in ("hidden", "residual"))
    for got, name in zip(block(hidden), ("hidden", "residual")):
        close(got, data[f"out/{name}_nores"])
    out = block(hidden, residual)
    for got, name in zip(out, ("hidden", "residual")):
        close(got, data[f"out/{name}_res"])
    sum(
        (got * data[f"loss/R_{name}_res"]).sum() for got, name in zip(out, ("hidden", "residual"))
    ).backward()
    close(hidden.grad, data["grad/in/hidden"])
    close(residual.grad, data["grad/in/residual"])
    close(block.norm.weight.grad, data["grad/state/norm.weight"])
    assert recorded_gradients(block.mixer, data, "mixer.") == 3


def test_parity_with_the_released_channel_flip():
    data = load_file(PARITY / "mamba_v4_mamba3d.safetensors")
    layer = Mamba(width=16, flip_channels=True)
    load_layer(layer, states(data))
    hidden = data["in/hidden"].clone().requires_grad_()
    out = layer(hidden)
    close(out, data["out/hidden"])
    (out * data["loss/R"]).sum().backward()
    close(hidden.grad, data["grad/in/hidden"])
    assert recorded_gradients(layer, data) == 4


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("chunk", [1, 4, 19, 50, None])
def test_chunks_equal_the_reference(dtype, tolerance, chunk):
    tensors = inputs(dtype=dtype)
    slow = value_and_grads(selective_scan_reference, tensors)
    fast = value_and_grads(lambda *x: selective_scan(*x, chunk=chunk), tensors)
    for a, b in zip(fast, slow):
        close(a, b, tolerance)


@pytest.mark.parametrize(
    "b, l, d, n", [(1, 1, 1, 1), (1, 70, 24, 16), (2, 33, 5, 3), (9, 32, 8, 8)]
)
def test_compiled_equals_double_and_repeats(b, l, d, n):
    "Values and gradients to 1e-6 of their norm; the same whatever the threads, bit for bit."
    exact = inputs(b, l, d, n)
    single = [x.detach().float().requires_grad_() for x in exact]
    compiled = partial(selective_scan, backend="cpu")
    wanted = value_and_grads(selective_scan_reference, exact)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(value_and_grads(compiled, single))
    torch.set_num_threads(before)
    for want, ours, again in zip(wanted, *found):
        assert ours.dtype == torch.float32
        assert (ours - want).norm() <= 1e-6 * want.norm()
        assert torch.equal(ours, again)
    with torch.no_grad():
        assert torch.equal(compiled(*single), found[0][0])


@pytest.mark.parametrize("which", range(6))
def test_compiled_gradient_of_one_input_alone(which):
    tensors = [x.float().detach() for x in inputs()]
    wanted = value_and_grads(selective_scan, [x.clone().requires_grad_() for x in tensors])
    tensors[which].requires_grad_()
    y = selective_scan(*tensors)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert torch.equal(tensors[which].grad, wanted[1 + which])


def test_compiled_keeps_what_is_not_finite():
    for which in range(6):
        tensors = [x.float().detach().clone() for x in inputs()]
        tensors[which].view(-1)[0] = torch.nan
        ours, plain = selective_scan(*tensors), selective_scan_reference(*tensors)
        assert torch.equal(ours.isnan(), plain.isnan()) and plain.isnan().any()


def test_scan_is_differentiable_once():
    for backend in ("cpu", "torch"):
        u, *rest = (x.float().detach() for x in inputs())
        u.requires_grad_()
        y = selective_scan(u, *rest, backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_shapes_that_do_not_fit_are_refused():
    u, delta, A, B, C, D = inputs(dtype=torch.float32)
    for backend in ("auto", "cpu", "torch"):
        with pytest.raises(ValueError, match="selective_scan.B: expected shape"):
            selective_scan(u, delta, A, B[:, 1:], C, D, backend=backend)
        with pytest.raises(ValueError, match="selective_scan.D: expected shape"):
            selective_scan(u, delta, A, B, C, D[1:], backend=backend)


def test_gradients_of_the_scan():
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(*x, chunk=3), inputs(b=1, l=7, d=2, n=2)
    )


def test_very_large_and_very_small_steps():
    u, delta, A, B, C, D = (x.detach().float() for x in inputs(l=200))
    for scale in (1e-6, 1e3):
        tensors = [
            x.requires_grad_()
            for x in (u, delta * scale, A.clone(), B.clone(), C.clone(), D.clone())
        ]
        for a, b in zip(
            value_and_grads(selective_scan, tensors),
            value_and_grads(selective_scan_reference, tensors),
        ):
            assert a.isfinite().all()
            close(a, b, 1e-4)


def test_the_past_does_not_see_the_future_nor_the_padding():
    torch.manual_seed(0)
    for flip in (False, True):
        layer, x = Mamba(width=8, flip_channels=flip), torch.randn(2, 15, 8)
        torch.testing.assert_close(
            layer(F.pad(x, (0, 0, 0, 9)))[:, :15], layer(x), rtol=1e-5, atol=1e-6
        )


def test_clouds_are_independent():
    u, delta, A, B, C, D = inputs(b=3)
    y = selective_scan(u, delta, A, B, C, D)
    for i in range(3):
        torch.testing.assert_close(
            selective_scan(u[i : i + 1], delta[i : i + 1], A, B[i : i + 1], C[i : i + 1], D),
            y[i : i + 1],
        )


@pytest.mark.parametrize("b,l", [(0, 5), (2, 0), (1, 1)])
def test_empty_and_single_sequences(b, l):
    tensors = inputs(b=b, l=l)
    y = selective_scan(*tensors)
    assert y.shape == (b, l, 5)
    torch.testing.assert_close(y, selective_scan_reference(*tensors))


def test_half_precision_is_computed_in_single():
    tensors = inputs(dtype=torch.float32)
    exact, rough = selective_scan(*tensors), selective_scan(*(x.bfloat16() for x in tensors))
    assert rough.dtype == torch.bfloat16
    close(rough.float(), exact, 0.03)
    torch.manual_seed(0)
    block, x = MambaBlock(width=16), torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = block(x)
    hidden.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    close(hidden.float(), block(x)[0], 0.1)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="backend: expected 'auto'"):
        selective_scan(*inputs(), backend="cuda")
    with pytest.raises(ValueError, match="needs the package mamba-ssm"):
        selective_scan(*inputs(), backend="mamba_ssm")
    with pytest.raises(ValueError, match="'cpu' needs tensors on the CPU of at most 32 bits"):
        selective_scan(*inputs(), backend="cpu")


@pytest.mark.parametrize("kernel, found", [(None, False), (object(), True)])
def test_a_package_without_its_kernel_is_none(monkeypatch, kernel, found):
    "mamba-ssm can be installed without the compiled scan; its function then only raises."
    from unipre3d.backbones import mamba

    package, interface = (
        types.ModuleType("mamba_ssm"),
        types.ModuleType("mamba_ssm.ops.selective_scan_interface"),
    )
    interface.selective_scan_fn, interface.selective_scan_cuda = (lambda *args: None), kernel
    for module in (package, types.ModuleType("mamba_ssm.ops"), interface):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    mamba._kernel.cache_clear()
    assert (mamba._kernel() is not None) == found
    mamba._kernel.cache_clear()


def test_convolution_is_causal_and_depthwise():
    torch.manual_seed(0)
    ssm, x = SSM(6, 4, 4, 1), torch.randn(2, 11, 6)
    same = F.conv1d(x.mT, ssm.conv_weight.T[:, None], ssm.conv_bias, padding=3, groups=6)[
        ..., :11
    ].mT
    torch.testing.assert_close(ssm.convolve(x), same)


def test_spread():
    torch.manual_seed(0)
    x, owner = torch.randn(9, 4, 3), torch.tensor([0] * 4 + [2] * 5)
    torch.testing.assert_close(spread(x, owner, 3)[[0, 2]], torch.stack([x[:4].std(), x[4:].std()]))
    flat = torch.ones(3, 4, requires_grad=True)
    spread(flat, torch.zeros(3, dtype=torch.long), 1).backward()
    assert (flat.grad == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees():
    cpu = value_and_grads(selective_scan_reference, inputs(d=16, n=16, dtype=torch.float32))
    for a, b in zip(
        value_and_grads(selective_scan, inputs(d=16, n=16, dtype=torch.float32, device="cuda")), cpu
    ):
        close(a.cpu(), b, 1e-3)
