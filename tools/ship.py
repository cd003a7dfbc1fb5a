"""Train the weights that the package ships, from embedded data; write them to data/weights/NAME.

    python tools/ship.py objects [--steps N] [--run FOLDER]
    python tools/ship.py rooms
    python tools/ship.py both

None of `both` come with the package, because they are not as good on objects
(data/records/benchmark_unified_shipped.json).

A run folder that is finished already is not trained again: its weights are taken. The run of `--run` goes on where it
was stopped.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unipre3d.data.augment import Augment  # noqa: E402
from unipre3d.features import FeatureExtractor, load_weights  # noqa: E402
from unipre3d.recipes import recipes  # noqa: E402
from unipre3d.records import read_record  # noqa: E402
from unipre3d.runs.checkpoint import has_state, is_finished  # noqa: E402
from unipre3d.runs.recipe import Recipe, change  # noqa: E402
from unipre3d.runs.run import SMALL_BACKBONES, run_recipe  # noqa: E402

SHIPPED: dict[str, Recipe] = {
    "objects": change(
        recipes["object-transformer-mini"],
        about="features of objects: the default Transformer, which also reads normals and colours",
        backbone_options=SMALL_BACKBONES["StandardTransformer"],
        features=("xyz", "normal", "color_signed"),
        sampling="fps",
        augment=Augment(rotate="up", blank=0.4),
        steps=400,
        workers=0,
        picture_every=0,
    ),
    "rooms": change(
        recipes["scene-sparseunet-mini"],
        about="features of rooms: the small SparseUNet",
        augment=Augment(rotate="up", blank=0.25),
        steps=250,
        workers=0,
        picture_every=0,
    ),
    "both": change(
        recipes["both-sparseunet-mini"],
        about="features of objects and of rooms: one small SparseUNet",
        workers=0,
        picture_every=0,
    ),
}
LARGEST = 4 * 2**20  # bytes of the weights
KEPT = """kind recipe task values code seed steps ended data processes hardware train_seconds
    peak_memory_mb metrics""".split()  # of a run's record


def train(name: str, steps: int | None, folder: Path) -> Path:
    "A finished run of the recipe."
    recipe = SHIPPED[name] if steps is None else change(SHIPPED[name], steps=steps)
    if not is_finished(folder):
        done = run_recipe(f"weights-{name}", recipe, folder, resume=has_state(folder))
        if done.ended != "finished":
            sys.exit(f"ship: the run in {folder} is {done.ended}")
    return folder


def ship(name: str, folder: Path, target: Path) -> None:
    "The backbone of a run as shipped weights."
    kind = "rooms" if SHIPPED[name].data.alternate else ""  # any: all kinds are written
    backbone, transform, _, kinds = load_weights(folder, kind)
    record = read_record(folder / "record.json")
    kept = {key: record[key] for key in KEPT if key in record}
    FeatureExtractor(backbone, transform, kept, kinds).save_pretrained(target)
    size = (target / "model.safetensors").stat().st_size
    if size > LARGEST:
        most = f"expected at most {LARGEST / 2**20:g}; make it smaller"
        sys.exit(f"ship: {name} weighs {size / 2**20:.1f} MB, {most}")
    print(f"{target.relative_to(ROOT)}: {size / 2**20:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHIPPED)
    parser.add_argument("--steps", type=int, help="other than the recipe's")
    parser.add_argument("--run", type=Path, help="run folder; default: runs/weights-NAME")
    args = parser.parse_args()
    folder = args.run or ROOT / "runs" / f"weights-{args.name}"
    ship(args.name, train(args.name, args.steps, folder), ROOT / "data" / "weights" / args.name)


if __name__ == "__main__":
    main()
