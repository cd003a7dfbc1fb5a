"Orders along curves: released codes, continuity, ragged batches."

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unipre3d.geometry.serialization import (
    ORDERS,
    grid_coordinates,
    hilbert_code,
    serialize,
    snake_code,
    sweep_code,
    z_code,
)

PARITY = Path(__file__).parent / "parity" / "serialization_codes.safetensors"
DEPTH, AXES = 5, ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")


@pytest.fixture(scope="module")
def data():
    return load_file(PARITY)


def cube(side):
    return torch.cartesian_prod(*[torch.arange(side)] * 3)


def test_parity_of_the_curves(data):
    grid, batch = data["in/grid_coord"], data["out/batch"]
    turned = grid[:, [1, 0, 2]]
    codes = torch.stack(
        [
            z_code(grid, DEPTH),
            z_code(turned, DEPTH),
            hilbert_code(grid, DEPTH),
            hilbert_code(turned, DEPTH),
        ]
    )
    assert torch.equal(codes | batch << 3 * DEPTH, data["out/code"])
    for i, order in enumerate(ORDERS[:4]):
        rows = serialize(grid, batch, 2, order, depth=DEPTH)
        assert torch.equal(rows, data["out/order"][i])
        assert torch.equal(rows.argsort(), data["out/inverse"][i])


@pytest.mark.parametrize("axes", AXES)
def test_parity_of_the_released_snake(data, axes):
    grid, batch = data["in/grid_coord"], data["out/batch"]
    assert torch.equal(sweep_code(grid, batch, axes), data[f"out/pcm_{axes}"])
    assert torch.equal(
        serialize(grid, batch, 2, axes, released=True), data[f"out/pcm_{axes}"].argsort(stable=True)
    )


@pytest.mark.parametrize(
    "code",
    [
        lambda g: hilbert_code(g, 3),
        *(lambda g, a=a: snake_code(g, torch.zeros(len(g), dtype=torch.long), 1, a) for a in AXES),
    ],
)
def test_continuous_walks_visit_each_cell_once(code):
    grid = cube(8)
    walk = grid[code(grid).argsort()]
    assert code(grid).sort().values.tolist() == list(range(512))
    assert (walk[1:] - walk[:-1]).abs().sum(1).eq(1).all()


def test_z_order_nests():
    grid = cube(8)
    assert torch.equal(z_code(grid, 3) >> 3, z_code(grid >> 1, 2))
    assert z_code(grid, 3).sort().values.tolist() == list(range(512))
    big = torch.full((1, 3), 2**21 - 1)
    assert z_code(big, 21).item() == 2**63 - 1


@pytest.mark.parametrize("order", ORDERS)
def test_clouds_do_not_see_one_another(order):
    torch.manual_seed(0)
    xyz, batch = torch.rand(60, 3), torch.tensor([0] * 25 + [1] * 5 + [3] * 30)  # cloud 2 is empty
    grid = grid_coordinates(xyz, batch, 4, 0.05)
    rows = serialize(grid, batch, 4, order)
    assert torch.equal(batch[rows], batch)
    for cloud in (0, 1, 3):
        own = batch == cloud
        alone = serialize(
            grid_coordinates(xyz[own], batch[own] * 0, 1, 0.05), batch[own] * 0, 1, order
        )
        assert torch.equal(rows[own] - own.nonzero()[0], alone)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("released", [False, True])
def test_nothing_and_one_point(order, released):
    none = torch.zeros(0, dtype=torch.long)
    assert len(serialize(none.view(0, 3), none, 2, order, released=released)) == 0
    assert serialize(
        torch.zeros(1, 3).long(), torch.tensor([1]), 2, order, released=released
    ).tolist() == [0]


def test_flat_clouds_stay_apart():
    "In the released code a cloud of one layer lets points change their cloud; clouds stay whole here."
    grid, batch = cube(4)[:16], torch.arange(2).repeat_interleave(8)
    for order in ORDERS:
        assert torch.equal(batch[serialize(grid, batch, 2, order, released=True)], batch)


def test_grid_is_counted_from_each_clouds_corner():
    xyz, batch = torch.tensor([[-1.0, 0, 5], [-0.9, 0.2, 5.1], [3, 3, 3]]), torch.tensor([0, 0, 2])
    assert grid_coordinates(xyz, batch, 3, 0.1).tolist() == [[0, 0, 0], [1, 2, 1], [0, 0, 0]]


def test_errors_name_the_argument():
    grid, batch = torch.full((2, 3), 40), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="order: expected one of z, z-trans"):
        serialize(grid, batch, 1, "peano")
    with pytest.raises(ValueError, match="5 digits hold cells below 32, found 40"):
        serialize(grid, batch, 1, "z", depth=5)
    with pytest.raises(ValueError, match="cell: expected a length above 0"):
        grid_coordinates(torch.rand(2, 3), batch, 1, 0.0)
