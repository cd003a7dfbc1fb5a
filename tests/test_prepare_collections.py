"""Collections of meshes: what folders say, jobs that are killed and go on, files that take their process with them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from unipre3d.data.shapenet import ShapeNetViews
from unipre3d.worlds import prepare
from unipre3d.worlds.prepare import (
    MeshFile,
    describe_meshes,
    find_meshes,
    prepare_meshes,
    run_jobs,
    split_meshes,
)

HOW = dict(views=2, size=16, points=64)


def box(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box(rng.uniform(0.3, 1, 3)).export(path)
    return path


def textured(path, tint):
    "A square pyramid with a picture around it, as YCB keeps its scans."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), tint).save(path.parent / "texture_map.jpg")
    path.with_suffix(".mtl").write_text("newmtl material_0\nKd 1 1 1\nmap_Kd texture_map.jpg\n")
    lines = ["mtllib textured.mtl", "usemtl material_0"]
    lines += [
        f"v {x} {y} {z}" for x, y, z in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, 0.5, 1))
    ]
    lines += ["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1", "vt 0.5 0.5"]
    faces = ((1, 3, 2), (1, 4, 3), (1, 2, 5), (2, 3, 5), (3, 4, 5), (4, 1, 5))
    lines += ["f " + " ".join(f"{k}/{k}" for k in face) for face in faces]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(archive):
    with zipfile.ZipFile(archive) as z:
        return list(csv.DictReader(z.read("objects.csv").decode().splitlines()))


def test_shapenet_is_named_by_its_taxonomy(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "ShapeNetCore.v2"
    for synset in ("02691156", "04379243"):
        for k in range(3):
            box(root / synset / f"{k:032x}" / "models" / "model_normalized.obj", rng)
            (root / synset / f"{k:032x}" / "models" / "model_normalized.json").write_text("{}")
    found = describe_meshes(find_meshes(root))
    assert Counter(item.kind for item in found) == {"02691156": 3, "04379243": 3}
    taxonomy = [dict(synsetId="02691156", name="airplane,aeroplane,plane")]
    (root / "taxonomy.json").write_text(json.dumps(taxonomy))
    prepare.synset_names.cache_clear()
    archive = prepare_meshes(find_meshes(root), tmp_path / "out.zip", split=(1, 0, 0), **HOW)
    assert ShapeNetViews(archive).classes == ["04379243", "airplane"]
    assert {r["id"] for r in rows_of(archive)} == {f"{k:032x}" for k in range(3)}


def test_modelnet_keeps_its_test_split(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("bed", "chair"):
        for split, count in (("train", 8), ("test", 3)):
            for k in range(count):
                box(tmp_path / "ModelNet40" / kind / split / f"{kind}_{split}{k}.off", rng)
    archive = prepare_meshes(
        find_meshes(tmp_path / "ModelNet40"), tmp_path / "out.zip", split=(0.75, 0.25, 0), **HOW
    )
    rows = rows_of(archive)
    assert {r["id"] for r in rows if r["split"] == "test"} == {
        f"{kind}_test{k}" for kind in ("bed", "chair") for k in range(3)
    }
    assert Counter(r["split"] for r in rows) == dict(train=12, val=4, test=6)
    assert {r["class"] for r in rows} == {"bed", "chair"}


def test_things_of_one_number_share_a_split_and_their_texture(tmp_path):
    names = ["065-a_cups", "065-b_cups", "002_can", "003_box", "004_box", "005_soup"]
    for k, name in enumerate(names):
        home = tmp_path / "ycb" / name
        textured(home / "google_16k" / "textured.obj", (40 * k, 200, 30))
        textured(home / "google_64k" / "textured.obj", (0, 0, 0))
        (home / "clouds").mkdir()
        (home / "clouds" / "merged_cloud.ply").write_bytes(b"points, no mesh")
        (home / "google_16k" / "nontextured.stl").write_bytes(b"the same without texture")
    found = describe_meshes(find_meshes(tmp_path / "ycb"))
    assert sorted(item.name for item in found) == sorted(names)
    assert {item.path.parent.name for item in found} == {"google_16k"}
    for seed in range(8):
        splits = split_meshes(found, (0.5, 0.25, 0.25), seed)
        assert splits["ycb", "065-a_cups"] == splits["ycb", "065-b_cups"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out, no texture is missing
        archive = prepare_meshes(
            find_meshes(tmp_path / "ycb"), tmp_path / "out.zip", up="z", split=(1, 0, 0), **HOW
        )
    views = ShapeNetViews(archive)
    color = views.rows([r["id"] for r in rows_of(archive)].index("003_box"))["color"]
    assert (
        np.abs(color.astype(float).mean(0) / color.mean() - np.array([120, 200, 30]) / 116.7).max()
        < 0.2
    )
    assert {r["family"] for r in rows_of(archive)} == {"065", "002", "003", "004", "005"}


def test_folders_of_hashes_are_no_classes(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(4):
        box(tmp_path / "glbs" / f"000-{k:03d}" / f"{k:032x}.glb", rng)
    found = describe_meshes(find_meshes(tmp_path))
    assert {item.kind for item in found} == {"objaverse"}
    assert len(rows_of(prepare_meshes(find_meshes(tmp_path), tmp_path / "o.zip", **HOW))) == 4


def test_other_folders_are_classes_as_before(tmp_path):
    files = [box(tmp_path / "chair" / f"{k}.ply", np.random.default_rng(k)) for k in range(2)]
    assert describe_meshes(files) == [MeshFile(path, "chair", path.stem) for path in files]


# ---------------------------------------------------------------- several processes, and ends of them


def stop_at_three(x):
    if x == 3:
        os._exit(7)
    return 10 * x


def test_a_job_that_ends_its_process_costs_no_other():
    found = dict(run_jobs(stop_at_three, [(x,) for x in range(8)], 2))
    assert found == {x: None if x == 3 else 10 * x for x in range(8)}
    assert dict(run_jobs(stop_at_three, [], 2)) == {}


def test_the_bytes_are_those_of_one_process(tmp_path):
    rng = np.random.default_rng(0)
    files = [box(tmp_path / "box" / f"{k}.ply", rng) for k in range(5)]
    one = prepare_meshes(files, tmp_path / "one.zip", **HOW)
    two = prepare_meshes(files[::-1], tmp_path / "two.zip", **HOW, workers=2)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["box", "one.zip", "two.zip"]


SLOW = """
import time
from unipre3d.worlds.prepare import draw_object
def slowly(*args):
    time.sleep(0.3)
    return draw_object(*args)
"""
RUN = """
import sys
import slow
from unipre3d.worlds import prepare
prepare.draw_object = slow.slowly
files = prepare.find_meshes(sys.argv[1])
prepare.prepare_meshes(files, sys.argv[2], views=2, size=16, points=64, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_job_goes_on(tmp_path, monkeypatch, workers):
    rng = np.random.default_rng(0)
    files = [box(tmp_path / "box" / f"{k}.ply", rng) for k in range(8)]
    want = prepare_meshes(files, tmp_path / "want.zip", **HOW).read_bytes()
    out = tmp_path / "out.zip"
    waiting = tmp_path / "out.zip.objects"
    command = [sys.executable, "-c", RUN, str(tmp_path / "box"), str(out), str(workers)]
    (tmp_path / "slow.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env)
    end = time.monotonic() + 60
    while len(list(waiting.glob("*.zip"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not out.exists()
    time.sleep(1 if workers > 1 else 0)  # its processes follow
    finished = {p.name: p.stat().st_mtime_ns for p in waiting.glob("*.zip")}
    assert 2 <= len(finished) < 8
    for path in waiting.glob("*.zip"):
        assert zipfile.ZipFile(path).testzip() is None  # whole
    drawn = []
    plain = prepare.prepare_own
    monkeypatch.setattr(
        prepare,
        "prepare_own",
        lambda mesh, name, *a, **k: drawn.append(name) or plain(mesh, name, *a, **k),
    )
    prepare_meshes(files, out, **HOW)
    assert len(drawn) == 8 - len(finished)
    assert out.read_bytes() == want and not waiting.exists()


def test_other_options_and_other_files_are_drawn_anew(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    files = [box(tmp_path / "box" / f"{k}.ply", rng) for k in range(3)]
    out, drawn = tmp_path / "out.zip", []
    plain = prepare.prepare_own

    def stop(mesh, name, *args, **how):
        drawn.append(name)
        if name == "2":
            raise KeyboardInterrupt
        return plain(mesh, name, *args, **how)

    monkeypatch.setattr(prepare, "prepare_own", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_meshes(files, out, split=(1, 0, 0), **HOW)
    box(files[0], rng)  # another mesh
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(KeyboardInterrupt):
        prepare_meshes(files, out, split=(1, 0, 0), **HOW)
    with pytest.raises(KeyboardInterrupt):
        prepare_meshes(files, out, split=(1, 0, 0), **HOW | dict(points=32))
    assert drawn == ["0", "1", "2", "0", "2", "0", "1", "2"]


def test_a_wrong_number_of_processes_is_named(tmp_path):
    path = box(tmp_path / "box" / "a.ply", np.random.default_rng(0))
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        prepare_meshes([path], tmp_path / "out.zip", workers=0)


def test_a_broken_taxonomy_is_named(tmp_path):
    path = Path(tmp_path / "taxonomy.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="taxonomy.json: expected ShapeNet's taxonomy.json"):
        prepare.synset_names(path)
