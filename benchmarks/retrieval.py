"""Is another sampling of the same scanned object the nearest? Shipped weights beside random ones, on YCB's objects.

    python benchmarks/retrieval.py --data FOLDER [--json PATH]

FOLDER holds scanned objects as <id>.npz (vertices, faces, uv) and <id>.jpg (texture). Every object is sampled three
times, and the samples are rotated about the vertical by angles of their own: the first makes the gallery, the others
ask. Chance is one in the number of objects.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unipre3d.data.augment import about_z  # noqa: E402
from unipre3d.features import FeatureExtractor, nearest_clouds  # noqa: E402
from unipre3d.files import read_arrays  # noqa: E402
from unipre3d.records import data_hash, hardware  # noqa: E402
from unipre3d.worlds.mesh import (  # noqa: E402
    Material,
    Mesh,
    on_surface,
    sample_faces,
    smooth_normals,
    surface,
)

POINTS = (4096, 4096, 2048)  # of each sampling
SEEDS = (0, 1, 2)  # of random weights
COLUMNS = {
    "points": (),
    "points, normals": ("normal",),
    "points, normals, colours": ("normal", "color"),
}  # what the clouds have


def read_object(path: Path) -> Mesh:
    "A scanned object with its texture."
    arrays = read_arrays(path, ("vertices", "faces", "uv"))
    faces = arrays["faces"].astype(np.int64)
    corners = arrays["vertices"].astype(np.float64)[faces]
    rgba = np.asarray(Image.open(path.with_suffix(".jpg")).convert("RGBA"))
    count = len(faces)
    return Mesh(
        corners=corners,
        uv=(arrays["uv"] / np.float32(65535))[faces],
        normal=smooth_normals(corners).astype(np.float32),
        material=np.zeros(count, np.int64),
        part=np.zeros(count, np.int64),
        materials=[Material(texture=rgba)],
        parts=["object"],
    )


def sample(mesh: Mesh, points: int, seed: int) -> dict[str, np.ndarray]:
    "Points on an object, rotated about the vertical."
    rng = np.random.default_rng(seed)
    face, bary = sample_faces(mesh, points, rng)
    color, _, normal = surface(mesh, face, bary)
    R = about_z(rng.uniform(0, 2 * np.pi)).astype(np.float64)
    xyz = on_surface(mesh.corners, face, bary)
    return dict(xyz=xyz @ R.T, color=color.clip(0, 1), normal=normal @ R.T)


def scores(extractor: FeatureExtractor, clouds: list[list[dict]], columns: tuple[str, ...]) -> dict:
    "Fractions of the queries whose own object is nearest, or among five."
    rows = []
    for own in clouds:
        given = [{name: cloud[name] for name in ("xyz", *columns)} for cloud in own]
        rows.append([extractor.summary(**cloud) for cloud in given])
    rows = np.array(rows)  # [objects, samplings, 2 c]
    gallery, queries = rows[:, 0], rows[:, 1:]
    found = {}
    for k in range(queries.shape[1]):
        near, _ = nearest_clouds(gallery, 5, queries[:, k])
        hit = near == np.arange(len(gallery))[:, None]
        of = f"{POINTS[k + 1]} points"
        found[of] = dict(
            top1=round(float(hit[:, 0].mean()), 4), top5=round(float(hit.any(1).mean()), 4)
        )
    return found


def random_like(extractor: FeatureExtractor, seed: int) -> FeatureExtractor:
    "The same network with weights that nobody trained."
    torch.manual_seed(seed)
    return FeatureExtractor(
        type(extractor.backbone)(**extractor.backbone.config), extractor.transform
    )


def mean_of(found: list[dict]) -> dict:
    "The mean of several scores."
    return {
        of: {name: round(float(np.mean([one[of][name] for one in found])), 4) for name in first}
        for of, first in found[0].items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of scanned objects")
    parser.add_argument("--weights", default="objects", help="shipped weights, or a run folder")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    paths = sorted(args.data.glob("*.npz"))
    if len(paths) < 5:
        parser.error(
            f"--data: expected at least 5 objects <id>.npz, found {len(paths)} in {args.data}"
        )
    clouds = []
    for n, path in enumerate(paths):
        mesh = read_object(path)
        clouds.append([sample(mesh, points, 10 * n + k) for k, points in enumerate(POINTS)])
    extractor = FeatureExtractor.from_pretrained(args.weights)
    rows = {}
    for name, columns in COLUMNS.items():
        others = [scores(random_like(extractor, seed), clouds, columns) for seed in SEEDS]
        rows[name] = {"shipped": scores(extractor, clouds, columns), "random": mean_of(others)}
        print(name, json.dumps(rows[name]))
    record = {
        "kind": "benchmark",
        "task": "retrieval of another sampling of the same object, each rotated about the vertical",
        "data": {
            "name": "YCB objects (CC BY 4.0)",
            "objects": len(paths),
            "sha256": data_hash(args.data),
        },
        "weights": {
            "name": args.weights,
            "recipe": extractor.record.get("recipe"),
            "code": extractor.record.get("code"),
        },
        "random_seeds": len(SEEDS),
        "chance": round(1 / len(paths), 4),
        "hardware": hardware(),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
