"""Shards give what the folder gives: every file, every sample, every step of a run."""

import csv
import importlib.util
import json
import os
import shutil
import tarfile
from collections import defaultdict

import numpy as np
import pytest
import torch

from unipre3d.cli import main
from unipre3d.data.labelled import S3DIS, write_s3dis
from unipre3d.data.loading import StepSampler, make_loader
from unipre3d.data.readers import Concat, Store, Subset, shard_of
from unipre3d.data.samples import ViewSamples
from unipre3d.data.scannet import ScanNetFrames, write_box_rooms
from unipre3d.data.shapenet import ShapeNetViews, export_objects
from unipre3d.data.shards import INDEX, file_names, local_root, write_shards
from unipre3d.recipes import find_recipe
from unipre3d.runs.recipe import change
from unipre3d.runs.run import run_order, run_recipe, suspects


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    "Every sixth piece of furniture as a folder, and as shards of half a megabyte."
    home = tmp_path_factory.mktemp("objects")
    everything = ShapeNetViews()
    folder = export_objects(everything, home / "folder", indices=range(0, len(everything), 6))
    return folder, write_shards(Store(folder), home / "shards", 2**19, progress=False)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    home = tmp_path_factory.mktemp("rooms")
    folder = write_box_rooms(home / "folder", n_frames=4, hw=(24, 32), spacing=0.2)
    return folder, write_shards(Store(folder), home / "shards", 1, progress=False)


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def files_of(folder, shard):
    "The list of a shard: sample -> file -> place, bytes, checksum."
    lines = (folder / shard["name"]).with_suffix(".jsonl").read_bytes()
    places = {key: facts[:2] for key, facts in shard["samples"].items()}
    return {key: json.loads(lines[first : first + size]) for key, (first, size) in places.items()}


@pytest.fixture
def copied(objects, tmp_path):
    "Shards that a test may damage."
    return shutil.copytree(objects[1], tmp_path / "shards")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPRE3D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def webdataset_samples(path):
    "The samples of an archive by WebDataset's rule: neighbours whose names agree up to the first dot of the last part."
    samples = []
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, last = member.name.rpartition("/")
            base, _, end = last.partition(".")
            key = f"{folder}/{base}"
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            samples[-1][end] = archive.extractfile(member).read()
    return samples


@pytest.mark.parametrize("kind", ["objects", "rooms"])
def test_every_file_is_that_of_the_folder(kind, request):
    folder, shards = request.getfixturevalue(kind)
    plain, packed = Store(folder), Store(shards)
    names = list(file_names(plain))
    assert names == list(file_names(packed)) and len(names) > 20
    assert all(plain.read(name) == packed.read(name) for name in names)
    assert len(packed.shards.shards) > 2


def test_samples_fingerprints_and_lists_are_equal(objects, rooms):
    a, b = (ShapeNetViews(root, split="train", size=32) for root in objects)
    assert [a.name(i) for i in range(len(a))] == [b.name(i) for i in range(len(b))]
    assert a.fingerprint() == b.fingerprint()
    for i in range(0, len(a), 7):
        assert np.array_equal(a.rows(i)["xyz"], b.rows(i)["xyz"])
        assert np.array_equal(a.pixels(i, 2), b.pixels(i, 2))
    a, b = (ScanNetFrames(root, split="train", hw=(24, 32), labels=20) for root in rooms)
    assert a.fingerprint() == b.fingerprint() and a.frames(1) == b.frames(1)
    assert all(np.array_equal(a.rows(1)[k], b.rows(1)[k]) for k in a.rows(1))
    assert np.array_equal(a.view(0, 20).depth, b.view(0, 20).depth)


def test_a_window_of_shards_is_a_value_of_a_recipe(objects, rooms, tmp_path, cache):
    folder, shards = objects
    blocks = ViewSamples(ShapeNetViews(shards, split="train", size=16), n_points=32).shards
    store = Store(shards).shards
    names = [ShapeNetViews(shards, split="train").name(i) for i in range(len(blocks))]
    assert list(blocks) == [store.shard_of(name) for name in names] and len(set(blocks)) > 2
    room = ScanNetFrames(rooms[1], split="train", hw=(24, 32))
    assert shard_of(room, 1) == Store(rooms[1]).shards.shard_of(f"train/{room.name(1)}")
    assert shard_of(Subset(room, [1]), 0) == shard_of(Concat(room, room), len(room) + 1)
    small = dict(steps=2, batch_size=4, n_points=64, image_cache_mb=0, shard_window=1)
    small |= dict(image="rgb", validate_every=0, workers=0)
    recipe = change(find_recipe("object-transformer-mini"), source=str(shards), **small)
    task = recipe.build_task()
    order = run_order(recipe, task.samples)
    assert order == dict(blocks=blocks, window=1)
    steps = StepSampler(len(blocks), 4, **order)
    walk = [blocks[k] for k in steps.order(0)]
    stretches = [number for number, last in zip(walk, [None, *walk]) if number != last]
    assert len(stretches) == len(set(blocks))  # each shard is wanted once in an epoch
    seen = [k for step in range(2) for k, _ in steps.batch(step)]
    found = suspects(task.samples, [1, 2], 4, 0, **order)
    assert set(found) == {names[k] for k in seen}
    folders = change(recipe, source=str(folder))
    with pytest.raises(ValueError, match="shard_window: expected 0 for data that lie in no shards"):
        run_recipe("folder", folders, tmp_path / "no", device="cpu", say=lambda text: None)
    assert run_recipe("window", recipe, tmp_path / "run", device="cpu", say=print).record


def test_rooms_of_s3dis(tmp_path):
    rng = np.random.default_rng(0)
    for area in (1, 5):
        coord, color = rng.random((50, 3)), rng.integers(0, 255, (50, 3))
        write_s3dis(
            tmp_path / "s3dis",
            f"Area_{area}/office_1",
            coord=coord,
            color=color,
            segment=np.zeros(50, int),
        )
    shards = write_shards(Store(tmp_path / "s3dis"), tmp_path / "out", progress=False)
    a, b = (S3DIS(root, split="test") for root in (tmp_path / "s3dis", shards))
    assert a.name(0) == b.name(0) and np.array_equal(a.rows(0)["xyz"], b.rows(0)["xyz"])


def test_a_loader_goes_on_in_mid_epoch_and_processes_share_a_step(objects):
    samples = ViewSamples(ShapeNetViews(objects[1], split="train", size=16), n_points=32)
    whole = list(make_loader(samples, 0, 5, batch_size=4))
    resumed = list(make_loader(samples, 3, 5, batch_size=4, num_workers=2))
    for a, b in zip(whole[3:], resumed, strict=True):
        assert torch.equal(a.target.rgb, b.target.rgb) and torch.equal(a.points.feat, b.points.feat)
    parts = [list(make_loader(samples, 0, 5, batch_size=2, rank=r, world_size=2)) for r in (0, 1)]
    for step, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(step.points.xyz, torch.cat([first.points.xyz, second.points.xyz]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_order_by_shards_reads_each_cloud_once(world):
    blocks = tuple(k % 25 for k in range(600))
    how = dict(n=600, batch_size=12 // world, stop=50, world_size=world, blocks=blocks)
    ranks = [StepSampler(**how, rank=rank) for rank in range(world)]
    keys = [key for step in range(50) for rank in ranks for key in rank.batch(step)]
    assert sorted(keys) == [(k, 0) for k in range(600)]
    assert len({blocks[k] for k, _ in keys[:192]}) == 8  # of 24 clouds each
    alone = StepSampler(600, 12, stop=50, blocks=blocks)
    assert [key for batch in alone for key in batch] == keys


def course(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_from_shards_is_the_run_from_the_folder(objects, tmp_path, cache):
    recipe = find_recipe("object-transformer-mini")
    small = dict(steps=3, batch_size=4, n_points=256, image_cache_mb=0, feature_cache_mb=0)
    courses = []
    for name, root in zip(("folder", "shards"), objects):
        own = change(recipe, source=str(root), validate_every=0, **small)
        outcome = run_recipe(name, own, tmp_path / name, device="cpu", say=lambda text: None)
        courses.append(course(tmp_path / name))
        assert 0 <= outcome.record["waiting_share"] <= 1
    assert courses[0] == courses[1] and len(courses[0]) == 3


def test_a_stopped_call_goes_on_with_the_next_shard(objects, tmp_path):
    class Stopping(Store):
        left = 1000

        def read(self, name):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().read(name)

    folder, whole = objects
    with pytest.raises(KeyboardInterrupt):
        write_shards(Stopping(folder), tmp_path / "out", 2**19, progress=False)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 0 < len(done) < len(index_of(whole)["shards"])
    write_shards(Store(folder), tmp_path / "out", 2**19, progress=False)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert index_of(tmp_path / "out") == index_of(whole)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(whole))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "web page"])
def test_a_damaged_shard_is_one_line_with_its_name(copied, damage):
    shard = index_of(copied)["shards"][0]
    path = copied / shard["name"]
    files = next(iter(files_of(copied, shard).values()))
    name, (first, size, _) = next(iter(files.items()))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[first + size // 2] ^= 1
    if damage == "cut":
        data = data[: len(data) // 2]
    path.write_bytes(b"<html>" if damage == "web page" else data)
    if damage == "missing":
        path.unlink()
    with pytest.raises((OSError, ValueError), match=shard["name"]) as problem:
        Store(copied).read(name)
    assert "\n" not in str(problem.value) and ": expected " in str(problem.value)


@pytest.mark.parametrize("ending", [".tar", ".jsonl"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_shard_that_is_not_whole_is_found_at_once(copied, damage, ending):
    "The last one, of which a run would read an hour later."
    path = (copied / index_of(copied)["shards"][-1]["name"]).with_suffix(ending)
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-1])
    with pytest.raises((OSError, ValueError), match=f"{path.name}: expected a shard"):
        Store(copied)


@pytest.mark.parametrize("key", ["size", "list_size"])
def test_a_size_of_another_type_is_named(copied, key):
    index = index_of(copied)
    index["shards"][0][key] = []
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: expected an index of shards"):
        Store(copied)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_list_is_one_line_with_its_name(copied, damage):
    shard = index_of(copied)["shards"][0]
    path = (copied / shard["name"]).with_suffix(".jsonl")
    name = next(iter(next(iter(files_of(copied, shard).values()))))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-5])
    if damage == "missing":
        path.unlink()
    with pytest.raises((OSError, ValueError), match=path.name) as problem:
        Store(copied).read(name)
    assert "\n" not in str(problem.value) and ": expected " in str(problem.value)


def test_shards_of_an_earlier_version_are_named(copied):
    index = index_of(copied) | {"version": 1}
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected version 2 of the list, found version 1; write"):
        Store(copied)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "unipre3d-shards"}',
        '{"format": "unipre3d-shards", "version": 2, "files": {}, "shards": [3]}',
        '{"format": "unipre3d-shards", "version": 2, "files": {"a": 1}, "shards": []}',
        '{"format": "unipre3d-shards", "version": 2, "files": {"../a": [1, 2]}, "shards": []}',
        '{"format": "unipre3d-shards", ',
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX}: expected") as problem:
        Store(tmp_path)
    assert "\n" not in str(problem.value)


def test_an_index_may_be_larger_than_other_files_unpack_to(objects, monkeypatch):
    "One of a million files was written, and refused when it was read."
    monkeypatch.setenv("UNIPRE3D_UNPACK_MB", "0")
    assert list(file_names(Store(objects[1]))) == list(file_names(Store(objects[0])))


def test_fetched_shards_keep_to_their_bound(objects, cache, monkeypatch):
    monkeypatch.setenv("UNIPRE3D_SHARDS_MB", "2")
    near, far = ShapeNetViews(objects[0], size=16), ShapeNetViews(objects[1].as_uri(), size=16)
    folder = local_root(objects[1].as_uri())
    assert folder.parent == cache and not list(folder.glob("*.tar"))
    most = 0
    for i in range(0, len(far), 3):
        assert np.array_equal(near.pixels(i, 0), far.pixels(i, 0))
        most = max(most, sum(path.stat().st_size for path in folder.glob("*.tar")))
    assert 2**20 < most <= 2 * 2**20 < sum(s["size"] for s in index_of(objects[1])["shards"])
    assert not list(folder.glob("*.part"))


def test_what_is_fetched_is_compared_with_its_sha256(copied, cache):
    reader = ShapeNetViews(copied.as_uri())
    for path in copied.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-\d+.tar: expected .* sha256"):
        reader.rows(0)
    for path in copied.glob("*.tar"):
        path.unlink()
    with pytest.raises((OSError, ValueError), match=r"tar: expected a shard at this address"):
        reader.rows(0)
    with pytest.raises((OSError, ValueError), match="nowhere/index.json: expected"):
        ShapeNetViews((copied / "nowhere").as_uri())


def test_the_archives_are_webdatasets(objects, rooms):
    for _, shards in (objects, rooms):
        store = Store(shards)
        for shard in index_of(shards)["shards"]:
            read = webdataset_samples(shards / shard["name"])
            assert [s["__key__"] for s in read] == list(shard["samples"])
            for sample, files in zip(read, files_of(shards, shard).values()):
                bytes_of = [sample[end] for end in sample if end != "__key__"]
                assert bytes_of == [store.read(name) for name in files]


@pytest.mark.skipif(not importlib.util.find_spec("webdataset"), reason="needs webdataset")
def test_webdatasets_own_tools_read_them(objects):
    import webdataset

    found = defaultdict(int)
    for shard in index_of(objects[1])["shards"]:
        for sample in webdataset.WebDataset(str(objects[1] / shard["name"]), shardshuffle=False):
            own = files_of(objects[1], shard)[sample["__key__"]]
            found[sample["__key__"]] += len([k for k in sample if not k.startswith("__")]) == len(
                own
            )
    assert len(found) == len(ShapeNetViews(objects[0]).everything) and set(found.values()) == {1}


def test_the_command(objects, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "shard", "furniture", "--out", str(out), "--size-mb", "1"]) == 0
    assert f"{len(ShapeNetViews()):,} samples in" in capsys.readouterr().out
    assert len(ShapeNetViews(out)) == len(ShapeNetViews())
    assert main(["data", "shard", "furniture", "--out", str(out)]) != 0
    assert "found finished shards" in capsys.readouterr().err
