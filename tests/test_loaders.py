"""Samples of rooms: which frames, what moves together, and the promises of loading."""

import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unipre3d.core import collate
from unipre3d.data.augment import Augment
from unipre3d.data.loading import eval_loader, make_loader
from unipre3d.data.samples import ViewSamples, choose_frames, match, point_features
from unipre3d.data.readers import DecodedImages, read_views
from unipre3d.data.scannet import ScanNetFrames, write_box_rooms
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.geometry.cameras import project, unproject

HW = (48, 64)
CHANGES = dict(rotate="up", scale=(0.8, 1.25), mirror=True, color=0.2)
AUGMENT = dict(augment=Augment(**CHANGES))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return write_box_rooms(
        tmp_path_factory.mktemp("box") / "rooms",
        rooms=dict(a="train", b="train", c="train"),
        n_frames=20,
        hw=HW,
        spacing=0.15,
    )


def samples(root, **options):
    scene = dict(
        n_points=None,
        n_ref=8,
        n_target=8,
        max_gap=5,
        features=("normal", "color_signed"),
        center=True,
    )
    return ViewSamples(ScanNetFrames(root, split="train", hw=HW), **scene | options)


def same(a, b):
    pairs = [
        (a.points.xyz, b.points.xyz),
        (a.points.feat, b.points.feat),
        (a.points.batch, b.points.batch),
    ]
    for v, w in ((a.ref, b.ref), (a.target, b.target)):
        pairs += [
            (v.rgb, w.rgb),
            (v.depth, w.depth),
            (v.camera.world_to_cam, w.camera.world_to_cam),
            (v.camera.K, w.camera.K),
            (v.camera.batch, w.camera.batch),
        ]
    return all(torch.equal(x, y) for x, y in pairs)


# ---- which frames


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 15, 16, 17, 24, 60, 300])
@pytest.mark.parametrize(
    "n_ref, n_target, gap", [(8, 8, 5), (8, 8, 1), (2, 8, 5), (8, 2, 5), (1, 1, 1), (1, 8, 1)]
)
def test_references_are_near_their_targets_and_never_targets(n, n_ref, n_target, gap):
    for seed in range(10):
        ref, target = choose_frames(n, n_ref, n_target, gap, np.random.default_rng(seed))
        assert 1 <= len(ref) <= n_ref and 1 <= len(target) <= n_target
        assert not set(ref) & set(target) and len(set(target)) == len(target)
        assert 0 <= min(*ref, *target) and max(*ref, *target) < n
        assert (abs(ref[:, None] - target) <= gap).any(1).all()  # each reference near some target
        if n_ref >= n_target:
            assert (
                (abs(ref[:, None] - target) <= gap).any(0).all()
            )  # and each target near some reference


def test_a_long_scene_gives_all_and_distinct_ones_in_pairs():
    for seed in range(50):
        ref, target = choose_frames(40, 8, 8, 5, np.random.default_rng(seed))
        assert len(set(ref)) == len(ref) == len(target) == 8 and (abs(ref - target) <= 5).all()


def test_every_frame_has_its_turn():
    seen = Counter()
    for seed in range(300):
        seen.update(choose_frames(30, 8, 8, 5, np.random.default_rng(seed))[1].tolist())
    assert len(seen) == 30 and max(seen.values()) < 2 * min(seen.values())


def test_matching_is_as_large_as_possible():
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = [rng.choice(5, rng.integers(0, 4), replace=False).tolist() for _ in range(4)]
        found = match(wanted)
        taken = [p for p in found if p is not None]
        assert len(set(taken)) == len(taken) and all(
            p is None or p in w for p, w in zip(found, wanted)
        )
        assert len(taken) == max(
            sum(p in w for p, w in zip(places, wanted)) for places in permutations(range(5), 4)
        )


def test_choose_says_what_the_sample_holds(root):
    data = samples(root)
    ref, target = data.choose(1, 3)
    s, views = data[1, 3], read_views(data.source, 1, ref + target)
    assert torch.equal(torch.cat([s.ref.rgb, s.target.rgb]), views.rgb) and torch.equal(
        torch.cat([s.ref.depth, s.target.depth]), views.depth
    )
    assert (
        len(ref) == len(target) == 8 and max(abs(a - b) for a, b in zip(ref, target)) <= 5 * 20
    )  # numbers are 20 apart


def test_short_scenes(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "rooms"))
    for p in (copy / "2D" / "pose" / "a").iterdir():
        if int(p.stem) > 80:
            p.unlink()
    for p in (copy / "2D" / "pose" / "b").iterdir():
        if int(p.stem) > 0:
            p.unlink()
    with pytest.warns(UserWarning) as said:
        data = samples(copy)
    assert [str(w.message) for w in said if "left out" in str(w.message)] == [
        "left out 1 of 3 clouds, without at least 2 usable views (some to see, some to render): b"
    ]
    assert "skipped 19 frames: no pose file" in str(said[0].message)
    assert len(data) == 2 and [data.name(k) for k in (0, 1)] == ["a", "c"]
    s = data[0]
    assert 1 <= len(s.ref) <= 3 and 1 <= len(s.target) <= 3
    batch = data.batch([(0, 0), (1, 0)])  # scenes of unlike length in one batch
    assert torch.bincount(batch.target.camera.batch).tolist() == [len(s.target), 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all was said; a loader's processes hold the same scenes
        one, two = (list(make_loader(data, 0, 3, batch_size=2, num_workers=n)) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(one, two))


def test_a_split_without_a_whole_scene_is_an_error(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "rooms"))
    for scene in "abc":
        for p in (copy / "2D" / "pose" / scene).iterdir():
            if int(p.stem):
                p.unlink()
    with (
        pytest.warns(UserWarning, match="no pose file"),
        pytest.raises(
            ValueError,
            match=r"^views: expected clouds with at least 2 usable views [^\n]*, found none among 3: a, b, c$",
        ),
    ):
        samples(copy)


def test_scenes_are_counted_without_looking_at_every_frame(root, monkeypatch):
    from unipre3d.data import scannet

    headers = []
    monkeypatch.setattr(
        scannet,
        "read_header",
        lambda *args, read=scannet.read_header: headers.append(args[2]) or read(*args),
    )
    data = samples(root)
    assert len(headers) == 3 * 2 * 2  # scenes, frames, images
    data.source.frames(0)
    assert len(headers) == 3 * 2 * 2 + 20 * 2


# ---- what moves together


def at_depth(s):
    "Points of a sample in all its frames: uv, and whether they are at the frame's depth."
    uv, seen = [], []
    for v in (s.ref, s.target):
        where, z, inside = project(s.points.xyz, s.points.batch, v.camera)
        (h, w), view = v.camera.hw, torch.arange(len(v))[:, None]
        depth = v.depth[
            view, where[..., 1].long().clamp(0, h - 1), where[..., 0].long().clamp(0, w - 1)
        ]
        uv.append(where)
        seen.append(inside & ((z / depth - 1).abs() < 0.02))
    return torch.cat(uv), torch.cat(seen)


def linear_map(a, b):
    "[3 3] that takes the points of one sample to those of the other."
    return torch.linalg.lstsq(a.points.xyz[::50].double(), b.points.xyz[::50].double()).solution


@pytest.mark.parametrize(
    "options",
    [
        dict(rotate="up"),
        dict(rotate="all"),
        dict(scale=(0.5, 2.0)),
        dict(translate=2.0),
        dict(mirror=True),
        dict(color=0.3),
        CHANGES,
    ],
    ids=lambda o: "+".join(o),
)
def test_points_keep_their_pixels_and_depth(root, options):
    many = Augment(**options)
    mirrored = 0
    for draw in range(4):
        plain, moved = samples(root)[0, draw], samples(root, augment=many)[0, draw]
        (uv, seen), (uv2, seen2) = at_depth(plain), at_depth(moved)
        flip = bool(torch.linalg.det(linear_map(plain, moved)) < 0)
        mirrored += flip
        if flip:
            uv2 = torch.stack([HW[1] - uv2[..., 0], uv2[..., 1]], -1)
        assert seen.sum() > 2000 and (uv - uv2)[seen].abs().max() < 2e-3
        edge = ((uv - uv.round()).abs() < 5e-3).any(-1)  # rounding may move these to the next pixel
        assert torch.equal(seen[~edge], seen2[~edge])
    assert mirrored in ((1, 2, 3) if options.get("mirror") else (0,))


def test_depth_and_cameras_agree_after_every_change(root):
    "Back-projected pixels of all frames lie on the moved cloud."
    s = samples(root, **AUGMENT)[0, 2]
    xyz, valid = unproject(s.target.depth, s.target.camera)
    p = xyz[valid][::97]
    assert (
        torch.cdist(p, s.points.xyz).min(1).values.max() < 0.15 * 1.25
    )  # spacing of the cloud, scaled
    scale = float(torch.linalg.det(linear_map(samples(root)[0, 2], s)).abs() ** (1 / 3))
    height = float(s.points.xyz[:, 2].max() - s.points.xyz[:, 2].min())
    assert abs(scale - 1) > 0.01 and height == pytest.approx(2.5 * scale, rel=1e-4)


def test_cameras_stay_right_handed_rotations(root):
    data = samples(root, **AUGMENT)
    for draw in range(6):
        R = data[0, draw].ref.camera.world_to_cam[:, :3, :3]
        torch.testing.assert_close(R @ R.mT, torch.eye(3).expand_as(R), atol=1e-5, rtol=0)
        assert (torch.linalg.det(R) > 0).all()


def test_mirroring_moves_an_off_centre_principal_point(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "rooms"))
    text = (copy / "2D" / "intrinsics.txt").read_text().split()
    text[2] = str(float(text[2]) + 5)
    (copy / "2D" / "intrinsics.txt").write_text(" ".join(text))
    left = Augment(mirror=True)
    seen = {
        round(float(samples(copy, augment=left)[0, d].ref.camera.K[0, 0, 2]), 3) for d in range(8)
    }
    assert seen == {37.0, 27.0}  # 32 + 5 and 64 - 37
    for draw in range(4):
        a, b = samples(copy)[0, draw], samples(copy, augment=left)[0, draw]
        u, u2 = (project(x.points.xyz, x.points.batch, x.ref.camera)[0][..., 0] for x in (a, b))
        inside = project(a.points.xyz, a.points.batch, a.ref.camera)[2]
        if not torch.equal(a.points.xyz, b.points.xyz):
            assert (u + u2 - HW[1])[inside].abs().max() < 2e-3
        else:
            assert torch.equal(u, u2)


def test_colours_change_alike_in_points_and_images(root):
    "The same affine map, up to clipping: fitted on the points it predicts the images."
    options = dict(features=("color",), n_ref=2, n_target=2)
    a, b = (
        samples(root, **options)[0, 1],
        samples(root, augment=Augment(color=0.3), **options)[0, 1],
    )
    changed = False
    for c in range(3):
        x, y = a.points.feat[:, c], b.points.feat[:, c]
        free = (y > 0.001) & (y < 0.999)
        slope, bias = np.polyfit(x[free], y[free], 1)
        assert torch.allclose(
            b.target.rgb[:, c], (a.target.rgb[:, c] * slope + bias).float().clamp(0, 1), atol=1e-4
        )
        changed |= abs(slope - 1) > 0.01 or abs(bias) > 0.01
    assert (
        changed
        and torch.equal(a.points.xyz, b.points.xyz)
        and torch.equal(a.target.depth, b.target.depth)
    )


def test_normals_turn_with_the_points(root):
    s = samples(root, features=("normal",), **AUGMENT)[0, 2]
    outwards = s.points.xyz * s.points.feat
    wall = (s.points.xyz[:, 2] - s.points.xyz[:, 2].min()) > 1  # above the block: walls and ceiling
    assert (outwards[wall].sum(1) < 0).all()  # they face the middle of the room
    torch.testing.assert_close(
        s.points.feat.norm(dim=1), torch.ones(len(s.points)), atol=1e-5, rtol=0
    )


# ---- points and features


def test_the_origin_is_the_mean_of_the_whole_cloud(root):
    whole, part = samples(root)[0], samples(root, n_points=100)[0]
    assert whole.points.xyz.mean(0).abs().max() < 1e-4 and len(part.points) == 100
    assert set(map(tuple, part.points.xyz.tolist())) <= set(
        map(tuple, whole.points.xyz.tolist())
    )  # some of the same points, not centred anew
    plain = samples(root).source
    shift = torch.from_numpy(plain.array(0, "coord").mean(0, dtype=np.float64))
    ref, _ = samples(root).choose(0)
    torch.testing.assert_close(
        whole.ref.camera.center.double(),
        read_views(plain, 0, ref).camera.center.double() - shift,
        atol=1e-4,
        rtol=0,
    )
    assert whole.ref.mask is None and whole.label is None


def test_features(root):
    s = samples(root, features=("xyz", "height", "normal", "color", "color_signed"))[0]
    xyz, height, normal, color, signed = s.points.feat.split([3, 1, 3, 3, 3], 1)
    assert torch.equal(xyz, s.points.xyz) and height.min() == 0
    stored = samples(root).source.rows(0)
    assert np.array_equal(normal, stored["normal"]) and np.array_equal(
        color, stored["color"] / np.float32(255)
    )
    np.testing.assert_allclose(
        signed, stored["color"] / 127.5 - 1, atol=1e-6
    )  # the released code's range
    default = samples(root)[0].points.feat
    assert torch.equal(default, torch.cat([normal, signed], 1))
    with pytest.raises(
        ValueError, match="^features: expected a cloud with normal, found one with xyz only$"
    ):
        point_features({"xyz": np.zeros((2, 3))}, ("normal",))


def test_a_feature_without_its_file_is_an_error(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "rooms"))
    (copy / "train" / "a" / "normal.npy").unlink()
    with pytest.raises(
        ValueError, match="^a: features: expected a cloud with normal, found one with"
    ):
        samples(copy)[0]
    assert samples(copy, features=("color_signed",))[0].points.feat.shape[1] == 3


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(n_ref=0), "n_ref"),
        (dict(max_gap=0), "max_gap"),
        (dict(n_points=0), "n_points"),
        (dict(augment=dict(scale=(2, 1))), "augment.scale"),
        (dict(augment=dict(color=1.0)), "augment.color"),
        (dict(augment=dict(scale=(0.5, 2), stretch=True)), "augment.stretch"),
        (dict(augment=dict(jitter=0.1)), "augment.jitter"),
        (dict(features=("smell",)), "features"),
    ],
)
def test_error_options(root, options, word):
    with pytest.raises(ValueError, match=f"^{word}: expected [^\n]*$"):
        if "augment" in options:
            options = dict(augment=Augment(**options["augment"]))
        samples(root, **options)


# ---- the promises of loading


@pytest.mark.parametrize(
    "options",
    [dict(), dict(n_points=500, **AUGMENT), dict(n_ref=2, n_target=3, features=("xyz",))],
    ids=["plain", "augmented", "few"],
)
def test_a_batch_is_its_samples_collated(root, options):
    data, keys = samples(root, **options), [(2, 0), (0, 5), (2, 1)]
    assert same(data.batch(keys), collate([data[k] for k in keys]))
    assert same(data[1, 4], samples(root, **options)[1, 4]) and not same(data[1, 4], data[1, 5])


def test_loader_resumes_and_workers_agree(root):
    make = lambda start, **kw: list(
        make_loader(samples(root, n_points=200, **AUGMENT), start, 6, batch_size=2, **kw)
    )
    whole = make(0)
    assert all(same(a, b) for a, b in zip(whole[3:], make(3)))
    assert all(same(a, b) for a, b in zip(whole[3:], make(3, num_workers=2)))
    assert not same(whole[0], make(0, seed=1)[0])


def test_evaluation_is_fixed_and_complete(root):
    a, b = (list(eval_loader(samples(root, n_points=200), batch_size=2)) for _ in range(2))
    assert all(same(x, y) for x, y in zip(a, b)) and [s.points.size for s in a] == [2, 1]


def test_reading_leaves_the_cache_as_it_was(root):
    data = samples(root, **AUGMENT)
    first = (
        data.source.view(0, 0).rgb.copy(),
        data.source.array(0, "coord").copy(),
        data.source.world_to_cam(0).copy(),
    )
    for draw in range(6):
        data[0, draw]
    assert all(
        np.array_equal(x, y)
        for x, y in zip(
            first,
            (
                data.source.view(0, 0).rgb,
                data.source.array(0, "coord"),
                data.source.world_to_cam(0),
            ),
        )
    )


# -- decoded images on disk


def test_decoded_images_are_those_of_the_files(tmp_path):
    plain = ShapeNetViews(size=32, split="val")
    for turn in range(2):  # the second reader finds what the first one decoded
        reader = ShapeNetViews(size=32, split="val")
        reader.decoded = DecodedImages(2**20, tmp_path)
        for k in range(4):
            assert np.array_equal(reader.pixels(0, k), plain.pixels(0, k))
        (file,) = reader.decoded.files.values()
        assert (file.hits, file.misses) == ((0, 4) if turn == 0 else (4, 0))
        assert file.path.stat().st_size <= 2**20 and not reader.cache.items


def test_colour_and_depth_share_the_bound_and_stay(tmp_path):
    pixels = {
        "color": np.full((40, 60, 3), 7, np.uint8),
        "depth": np.full((40, 60), 9, np.uint16),
    }
    limit = 250_000  # less than all sixty take
    for turn in range(2):
        decoded = DecodedImages(limit, tmp_path, kinds=2)
        for number in range(30):
            for kind, image in pixels.items():
                what = ("unipre3d.data.scannet", image.shape, image.dtype.name, lambda: image)
                assert np.array_equal(decoded.get(f"{kind} {number}", "", *what), image)
        sizes = [file.path.stat().st_size for file in decoded.files.values()]
        assert len(sizes) == 2 and sum(sizes) <= limit
        if turn:  # a later run does not throw one away for the other
            assert all(file.hits > 5 for file in decoded.files.values())


def test_a_replaced_image_is_decoded_again(tmp_path):
    root = export_objects(ShapeNetViews(split="val"), tmp_path / "data", indices=[0])
    reader = ShapeNetViews(root, size=32)
    reader.decoded = DecodedImages(2**20, tmp_path / "cache")
    before = reader.pixels(0, 0)
    path = root / reader.image_file(0, 0)
    Image.open(path).transpose(Image.FLIP_LEFT_RIGHT).save(path)
    assert (
        np.array_equal(reader.pixels(0, 0), before[..., ::-1])
        and (before != before[..., ::-1]).any()
    )
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(ValueError, match="00.png"):
        reader.pixels(0, 0)


def test_processes_that_are_kept_read_again(root):
    data = samples(root, n_points=100, n_ref=1, n_target=1)
    for keep in (True, False):
        loader = eval_loader(data, batch_size=1, num_workers=2, prefetch=3, keep_workers=keep)
        assert loader.batches.prefetch_factor == 3
        readers, passes = [], []
        for _ in range(2):
            passes.append(list(loader))
            readers.append([reader.pid for reader in loader.readers])
        assert all(same(a, b) for a, b in zip(*passes, strict=True))
        assert len(set(readers[0])) == 2 and (readers[0] == readers[1]) == keep
    assert not make_loader(data, 0, 1, batch_size=1).batches.pin_memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_have_the_same_values(root):
    data = samples(root, n_points=100, n_ref=1, n_target=1)
    for a, b in zip(
        make_loader(data, 0, 2, batch_size=2), make_loader(data, 0, 2, batch_size=2, pin=True)
    ):
        assert same(a, b) and b.points.xyz.is_pinned() and not a.points.xyz.is_pinned()


def test_values_of_a_recipe_reach_the_loaders(monkeypatch, tmp_path):
    from unipre3d.recipes import find_recipe
    from unipre3d.runs import run
    from unipre3d.runs.recipe import change
    from unipre3d.tasks import pretrain

    given = {}

    def watch(module, name):
        usual = getattr(module, name)

        def call(*args, **how):
            given.setdefault(name, how)
            return usual(*args, **how)

        monkeypatch.setattr(module, name, call)

    watch(run, "make_loader")
    watch(pretrain, "eval_loader")
    small = dict(steps=1, batch_size=4, n_points=64, image="rgb", n_target=1, resolution=16)
    small |= dict(workers=1, prefetch=2, keep_workers=True, accumulate=2, image_cache_mb=0)
    recipe = change(find_recipe("object-transformer-mini"), **small)
    run.run_recipe("small", recipe, tmp_path / "run", device="cpu", say=lambda text: None)
    assert (
        given["make_loader"].items() >= dict(prefetch=2, num_workers=1, parts=2, pin=False).items()
    )
    assert given["eval_loader"].items() >= dict(prefetch=2, keep_workers=True, pin=False).items()
