"The recorded backbones: build one as released code would, and compare its features with the recorded ones."

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from unipre3d import backbones
from unipre3d.core import PointBatch
from unipre3d.geometry.sparse import SubMConv3d, point_cells

PARITY = Path(__file__).parent / "parity"
KINDS = dict(
    transformer="StandardTransformer",
    pointmlp="PointMLP",
    pcm="PCM",
    mamba3d="Mamba3D",
    sparseunet="SparseUNet",
    ptv3="PTv3",
)
RECORDED = sorted(p.stem for p in PARITY.glob("backbone_*.safetensors"))


def close(a, b, tolerance=1e-4):
    scale = b.abs().max()
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * scale, (
        f"worst {(a - b).abs().max():.2e} of {scale:.2e}"
    )


def recorded(name):
    "A model with random weights, the released state, everything recorded."
    data, card = (
        load_file(PARITY / f"{name}.safetensors"),
        json.loads((PARITY / f"{name}.json").read_text()),
    )
    kind = getattr(backbones, KINDS[name.split("_")[1]])
    extra = (
        {"order_prompt_ranges": card["order_prompt_ranges"]}
        if "order_prompt_ranges" in card
        else {}
    )
    model = kind.from_released(card["kwargs"] | extra).train(card["mode"] == "train")
    return (
        model,
        {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")},
        data,
    )


def points_of(data):
    "The recorded input."
    if "in/pos" in data:
        flat = data["in/pos"].flatten(0, 1)
        return PointBatch(
            flat[:, :3].contiguous(),
            flat,
            torch.arange(len(data["in/pos"])).repeat_interleave(data["in/pos"].shape[1]),
            len(data["in/pos"]),
        )
    sizes = torch.diff(data["in/offset"], prepend=data["in/offset"].new_zeros(1))
    return PointBatch(
        data["in/coord"],
        data["in/feat"],
        torch.arange(len(sizes)).repeat_interleave(sizes),
        len(sizes),
    )


def check_features(model, state, data):
    "Stem, body, the recorded fusion where there is one, norm."
    fused = {
        k.removeprefix("fusion_mlps."): v for k, v in state.items() if k.startswith("fusion_mlps.")
    }
    p = model.stem(points_of(data))
    if "out/sel_feat" in data:  # point fusion: the recorded rows join
        cell = torch.cat([data["in/grid_coord"], data["out/sel_grid_coord"]])
        p = PointBatch(
            (cell + 0.5) * 0.02,
            torch.cat([p.feat, data["out/sel_feat"]]),
            torch.zeros(len(cell), dtype=torch.long),
            1,
        )
        mix = SubMConv3d(p.feat.shape[1], p.feat.shape[1], 3, bias=True)
        mix.load_state_dict({k: fused[f"0.{k}"] for k in ("weight", "bias")})
        p = p.with_feat(
            F.batch_norm(
                mix(point_cells(p, 0.02)).feat,
                *(fused[f"1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")),
            ).relu()
        )
    p = model.body(p)
    if "out/pre_fusion" in data:  # feature fusion; a CLS row stands first where there is one
        rows = len(p) // p.size
        close(p.feat, data["out/pre_fusion"][:, -rows:].flatten(0, 1))
        p = p.with_feat(
            F.linear(
                torch.cat([p.feat, data["out/mapped"][:, -rows:].flatten(0, 1)], 1),
                fused["0.weight"],
                fused["0.bias"],
            ).relu()
        )
    close(model.norm(p.feat), data["out/features"].flatten(0, -2))
