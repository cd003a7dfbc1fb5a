"""The models of composed rooms from the furniture's source: an archive like data/furniture_meshes.npz, in some minutes.

    python tools/build_room_models.py [--deb FILE] [--out FILE] [--work FOLDER] [--workers N]

It needs `fast_simplification`. The embedded archive came from an earlier run, whose models have fewer triangles;
rooms are composed from that one, so their bytes stay. `near_duplicates` found the twins that
data/furniture_classes.csv leaves out.
"""

import argparse
import io
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from tqdm.auto import tqdm

from unipre3d.core import data_dir
from unipre3d.data.objects import read_csv
from unipre3d.worlds.furniture import find_deb, read_catalogue, read_model, unpack_deb
from unipre3d.worlds.mesh import Mesh, face_vectors, fit_textures, on_surface, sample_faces, surface
from unipre3d.worlds.rooms.models import STEP, model_roles


def near_duplicates(
    clouds: dict[str, tuple],  # id -> xyz [n 3] normalised, colour [n 3] 0..1
    distance: float = 0.0245,  # mean distance between the clouds
    color: float = 0.10,  # mean absolute difference of the colours of nearest points
) -> dict[str, str]:  # id of a duplicate -> id of the earlier object that it repeats
    "Objects that resemble one before them: nearest-point distance both ways, and colour."
    kept, found = {}, {}

    def same(one, other):
        (tree, xyz, rgb), (their_tree, their_xyz, their_rgb) = one, other
        if np.abs(np.ptp(xyz, axis=0) - np.ptp(their_xyz, axis=0)).max() > 0.15:
            return False
        gap, at = their_tree.query(xyz)
        if gap.mean() > 2 * distance:
            return False
        both = (gap.mean() + tree.query(their_xyz)[0].mean()) / 2
        return both < distance and np.abs(their_rgb[at] - rgb).mean() < color

    for name, (xyz, rgb) in clouds.items():
        one = cKDTree(xyz), xyz, rgb
        twin = next((other for other in kept if same(one, kept[other])), None)
        if twin is None:
            kept[name] = one
        else:
            found[name] = twin
    return found


def sample_mesh(
    mesh: Mesh,
    n: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # xyz, unit normal [n 3], colour and opacity [n 4]
    "Points spread over all surfaces, inner ones too; normals of triangles, colours in 0..1."
    face, bary = sample_faces(mesh, n, rng)
    cross = face_vectors(mesh.corners)[face]
    normal = cross / np.linalg.norm(cross, axis=1, keepdims=True)
    color, opacity, _ = surface(mesh, face, bary)
    return on_surface(mesh.corners, face, bary), normal, np.column_stack([color, opacity])


def distinct_corners(
    faces: np.ndarray,  # [f 3]
) -> np.ndarray:  # [f] bool
    "Whether a triangle's three vertices differ."
    return (faces != np.roll(faces, 1, axis=1)).all(1)


def decimate(
    corners: np.ndarray,  # [f 3 3]
    target: int,  # faces wanted at most
) -> tuple[np.ndarray, np.ndarray]:  # vertices [v 3], faces [f 3]
    "Fewer triangles: edges collapse; where loose pieces resist, vertices snap to a grid first."
    import fast_simplification

    points, span = corners.reshape(-1, 3), np.ptp(corners.reshape(-1, 3), axis=0).max()
    for cell in (1e-5, 0.004, 0.008, 0.016, 0.03, 0.05):
        snapped = np.round(points / (span * cell)).astype(np.int64)
        _, first, index = np.unique(snapped, axis=0, return_index=True, return_inverse=True)
        vertices, faces = points[first], index.reshape(-1, 3)
        faces = faces[distinct_corners(faces)]
        faces = faces[np.unique(np.sort(faces, 1), axis=0, return_index=True)[1]]
        if len(faces) > target:
            vertices, faces = fast_simplification.simplify(
                vertices, faces.astype(np.int64), target_count=target, agg=5.0
            )
        if len(faces) <= 1.15 * target:
            break
    used, index = np.unique(faces, return_inverse=True)
    return np.asarray(vertices)[used], index.reshape(-1, 3)


def split_faces(
    vertices: np.ndarray,  # [v 3]
    faces: np.ndarray,  # [f 3]
    which: np.ndarray,  # [f] bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # vertices, faces, and the old number of each face
    "Cut the chosen triangles across their longest edge; the new ones come last."
    corners = vertices[faces[which]]
    longest = np.linalg.norm(corners - np.roll(corners, -1, 1), axis=-1).argmax(1)
    a, b, c = np.take_along_axis(faces[which], (longest[:, None] + np.arange(3)) % 3, 1).T
    edge, number = np.unique(np.sort(np.stack([a, b], 1), 1), axis=0, return_inverse=True)
    middle = len(vertices) + number.reshape(-1)
    cut, kept = np.flatnonzero(which), np.flatnonzero(~which)
    return (
        np.concatenate([vertices, vertices[edge].mean(1)]),
        np.concatenate([faces[kept], np.stack([a, middle, c], 1), np.stack([middle, b, c], 1)]),
        np.concatenate([kept, cut, cut]),
    )


def one_side(
    normal: np.ndarray,  # [n 3]
) -> np.ndarray:  # [n 3]
    "Normals flipped into one half of space, because sheets have no sure side."
    return normal * np.where((normal * [0.31, 0.57, 0.76]).sum(1, keepdims=True) < 0, -1, 1)


INSIDE = np.array(  # weights of corners 1 and 2 at six points of a triangle
    [
        [0.12, 0.1],
        [0.12, 0.38],
        [0.12, 0.7],
        [0.4, 0.1],
        [0.4, 0.38],
        [0.7, 0.1],
    ]
)


def paint_faces(
    vertices: np.ndarray,  # [v 3]
    faces: np.ndarray,  # [f 3]
    mesh: Mesh,  # what they are a simpler form of
    budget: int,  # faces at most
    rng: np.random.Generator,
    points: int = 40_000,  # sampled on the model
    spread: float = 0.05,  # of colours in a face (standard deviation, 0..1) above which it is cut
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # vertices, faces, colour and opacity [f 4]
    """A colour for each face: the mean of the model's points nearest to it that face alike.
    Faces with a pattern are cut while the budget lasts."""
    xyz, normal, color = sample_mesh(mesh, points, rng)
    scale = 0.05 * np.ptp(xyz, axis=0).max()
    tree = cKDTree(np.concatenate([xyz, scale * one_side(normal)], 1))
    weights = np.concatenate([1 - INSIDE.sum(1, keepdims=True), INSIDE], 1)

    def paint(some):
        "Mean colour, unevenness and size (square root of twice the area) of some faces, [f 6]."
        corners = vertices[some]
        cross = face_vectors(corners)
        area = np.linalg.norm(cross, axis=1)
        spots = np.einsum("kc,fcx->fkx", weights, corners)
        normals = scale * one_side(cross / np.maximum(area, 1e-12)[:, None])[:, None]
        query = np.concatenate([spots, np.broadcast_to(normals, spots.shape)], -1)
        near = color[tree.query(query.reshape(-1, 6))[1]].reshape(len(some), len(weights), 4)
        size = np.sqrt(area)
        return np.column_stack([near.mean(1), near.std(1).mean(1) * size, size])

    painted = paint(faces)
    while len(faces) < budget:
        uneven, size = painted[:, 4], painted[:, 5]
        wanted = np.flatnonzero((uneven > spread * size) & (size > 0.012))
        if not len(wanted):
            break
        most = max(1, min(budget - len(faces), len(faces) // 3))
        wanted = wanted[np.argsort(-uneven[wanted], kind="stable")][:most]
        vertices, faces, old = split_faces(vertices, faces, np.isin(np.arange(len(faces)), wanted))
        kept = len(faces) - 2 * len(wanted)
        painted = np.concatenate([painted[old[:kept]], paint(faces[kept:])])
    return vertices, faces, painted[:, :4]


def pack_model(
    vertices: np.ndarray,  # [v 3] metres
    faces: np.ndarray,  # [f 3]
    color: np.ndarray,  # [f 3] in 0..1
) -> dict[str, np.ndarray]:  # vertices [v 3] uint16, faces [f 3] uint16, color [f 3] uint8
    """Whole half millimetres, equal vertices joined, in an order that compresses: vertices along z,
    faces along their first vertex."""
    whole = np.round((vertices - vertices.min(0)) / STEP).astype(np.int64)
    points, index = np.unique(whole[:, ::-1], axis=0, return_inverse=True)
    faces = index.reshape(-1)[faces]
    solid = distinct_corners(faces)
    faces, color = faces[solid], np.round(color[solid] * 51) * 5
    faces = np.take_along_axis(faces, (faces.argmin(1)[:, None] + np.arange(3)) % 3, 1)
    order = np.lexsort(faces.T[::-1])
    used, index = np.unique(faces[order], return_inverse=True)
    return dict(
        vertices=points[used][:, ::-1].astype(np.uint16),
        faces=index.reshape(-1, 3).astype(np.uint16),
        color=color[order].astype(np.uint8),
    )


def simplify_model(
    mesh: Mesh,  # metres, as `read_model` gives it
    seed: int = 0,
) -> dict[str, np.ndarray]:  # as `pack_model`
    "450 to 2,250 coloured triangles in place of up to a hundred thousand textured ones."
    size = np.linalg.norm(np.ptp(mesh.corners.reshape(-1, 3), axis=0))
    target = int(np.clip(450 + 650 * size, 450, 1500))
    vertices, faces = decimate(mesh.corners, target)
    vertices, faces, color = paint_faces(
        vertices, faces, fit_textures(mesh, 0.01), int(1.5 * target), np.random.default_rng(seed)
    )
    keep = color[:, 3] > 0.4
    return pack_model(vertices, faces[keep], color[keep, :3])


def write_meshes(
    packed: dict[str, dict],  # id -> `pack_model`
    out: str | Path,
) -> Path:
    "All models in one npz: byte planes of differences, LZMA; the same input gives the same bytes."
    models = [packed[id] for id in sorted(packed)]
    joined = {key: np.concatenate([m[key] for m in models]) for key in models[0]}
    joined["faces"][:, 1:] -= joined["faces"][:, :1]
    steps = {key: np.diff(x, axis=0, prepend=x[:1] * 0).T.copy() for key, x in joined.items()}
    for key in ("vertices", "faces"):
        steps[key] = steps[key].view(np.uint8).reshape(3, -1, 2).transpose(0, 2, 1).copy()
    counts = np.array([[len(m["vertices"]), len(m["faces"])] for m in models], dtype=np.uint32)
    arrays = dict(ids=np.array(sorted(packed)), counts=counts) | steps
    part = Path(out).with_suffix(".part")
    with zipfile.ZipFile(part, "w") as z:
        for name, array in arrays.items():
            np.save(file := io.BytesIO(), array)
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            z.writestr(info, file.getvalue(), zipfile.ZIP_LZMA)
    return part.replace(out)


def _simplify_job(job):
    path, entry = job
    with zipfile.ZipFile(path) as z:
        return entry.id, simplify_model(read_model(z, entry))


def build_meshes(
    deb: str | Path | None = None,  # the source package; None downloads it with apt-get
    out: str | Path = "runs/furniture_meshes.npz",
    work: str | Path = "runs/furniture",  # where the libraries are unpacked
    workers: int = 2,  # processes
) -> Path:  # the archive
    """An archive of simplified meshes from its source, in some minutes.
    Needs `fast_simplification`.

    Raises: FileNotFoundError or ValueError where the package is missing or another one."""
    libraries = unpack_deb(find_deb(deb, work), Path(work) / "libraries")
    roles = model_roles(
        read_csv(data_dir() / "furniture.csv"), read_csv(data_dir() / "room_roles.csv")
    )
    jobs = []
    for name, path in libraries.items():
        with zipfile.ZipFile(path) as z:
            catalogue = z.read("PluginFurnitureCatalog.properties").decode("latin1")
        jobs += [(path, e) for e in read_catalogue(catalogue, name) if e.id in roles]
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(_simplify_job, jobs)
        packed = dict(tqdm(made, total=len(jobs), desc="simplify", unit="model"))
    return write_meshes(packed, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deb", help="the source package; downloaded with apt-get if not given")
    parser.add_argument("--out", default="runs/furniture_meshes.npz", help="the archive")
    parser.add_argument("--work", default="runs/furniture", help="where the libraries are unpacked")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    print(build_meshes(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
