"""The site's table of contents, nbs/sidebar.yml, from the order of the book below.

Core is an evening; Workshop is everything else. Each page's "Next" leads to the page below it, and the landing page's
table has the same order (tests/test_structure.py). A notebook that stands in no section is an error, and so is a page
without a notebook.

    python tools/sidebar.py            write nbs/sidebar.yml
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"

CORE = {
    "The idea": ["index", "idea", "00_core"],
    "Points and pixels": [
        "geometry/10_cameras",
        "geometry/11_pointops",
        "30_image",
        "backbones/39_backbone",
        "backbones/40_transformer",
    ],
    "Gaussians": ["50_gaussians", "51_fusion", "52_render"],
    "Does it work?": ["60_pretrain", "tasks/72_classification", "65_own_cloud", "80_results"],
}
WORKSHOP = {
    "Tutorials": [
        "tutorials/meshes",
        "tutorials/labels",
        "tutorials/photographs",
        "tutorials/backbone",
        "tutorials/pyg",
    ],
    "Data": [
        "02_files",
        "03_values",
        "data/19_readers",
        "data/21_clouds",
        "data/17_objects",
        "data/22_shapenet",
        "data/23_scannet",
        "data/24_labelled",
        "data/17_augment",
        "data/24_folder",
        "data/26_samples",
        "data/27_posed",
        "data/28_import",
        "data/28_transform",
        "data/29_loading",
        "data/18_shards",
        "data/18_scale",
        "data/29_accepted",
    ],
    "Worlds": [
        "worlds/18_mesh",
        "worlds/25_prepare",
        "worlds/19_sensor",
        "worlds/20_furniture",
        "worlds/27_shapes",
        "worlds/28_depth",
        "worlds/28_scans",
        "worlds/31_rooms_models",
        "worlds/32_rooms_build",
        "worlds/33_rooms_furnish",
        "worlds/34_rooms_light",
        "worlds/35_rooms_film",
        "worlds/36_rooms_cloud",
        "worlds/37_rooms_disk",
    ],
    "More geometry": ["geometry/12_serialization", "geometry/13_sparse"],
    "More rendering": ["52_rasterization", "52_volume", "52_photograph", "54_formats", "54_viewer"],
    "More backbones": [
        "backbones/39_layers",
        "backbones/41_pointnet2",
        "backbones/42_pointmlp",
        "backbones/43_mamba",
        "backbones/44_pcm",
        "backbones/45_mamba3d",
        "backbones/46_sparseunet",
        "backbones/47_ptv3",
        "backbones/48_released",
        "backbones/49_adapter",
    ],
    "Runs": [
        "53_losses",
        "55_objective",
        "01_records",
        "56_recipe",
        "57_checkpoint",
        "05_tracking",
        "04_processes",
        "58_fit",
        "tasks/70_transfer",
        "59_run",
        "61_recipes",
    ],
    "Tasks": [
        "tasks/69_heads",
        "tasks/71_metrics",
        "tasks/73_parts",
        "tasks/66_scenes",
        "tasks/74_semantic",
        "tasks/75_instances",
        "tasks/68_masked",
        "tasks/68_contrast",
        "tasks/67_autoencoder",
    ],
    "Your own clouds": ["63_features", "64_predict", "66_view"],
    "Study": [
        "62_compare",
        "76_study",
        "77_statistics",
        "77_study2",
        "77_more",
        "77_sizes",
        "77_paradigms",
        "78_reproduce",
    ],
    "Results in full": [
        "80_results_paper",
        "80_results_objects",
        "80_results_rooms",
        "80_results_efficiency",
        "79_benchmarks",
        "80_results_claims",
        "80_results_runs",
    ],
    "Differences, command line, API": ["81_differences", "90_cli", "91_api"],
}
PARTS = {"Core": CORE, "Workshop": WORKSHOP}


def pages():
    "Every page of the book in order, as (part, section, path below nbs)."
    for part, sections in PARTS.items():
        for section, names in sections.items():
            for name in names:
                yield part, section, Path(f"{name}.ipynb")


def notebooks():
    "Every notebook below nbs; what tools keep in hidden folders is none."
    for path in sorted(NBS.rglob("*.ipynb")):
        path = path.relative_to(NBS)
        if not any(part.startswith((".", "_")) for part in path.parts):
            yield path


def check_order(found, listed):
    """The two hold the same pages, each once.

    Raises: ValueError that names the pages.
    """
    wrong = {
        "stand in no section of tools/sidebar.py": set(found) - set(listed),
        "stand in tools/sidebar.py and have no notebook": set(listed) - set(found),
        "stand in tools/sidebar.py twice": {page for page in listed if listed.count(page) > 1},
    }
    for what, which in wrong.items():
        if which:
            raise ValueError(f"{', '.join(sorted(map(str, which)))}: pages that {what}")


def sidebar():
    "The text of nbs/sidebar.yml; errors as `check_order`."
    check_order(list(notebooks()), [path for _, _, path in pages()])
    lines = ["# Written by tools/sidebar.py", "website:", "  sidebar:", "    contents:"]
    for part, sections in PARTS.items():
        lines += [f"      - section: {part}", "        contents:"]
        for section, names in sections.items():
            lines += [f"          - section: {section}", "            contents:"]
            lines += [f"              - {name}.ipynb" for name in names]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        text = sidebar()
    except ValueError as problem:
        sys.exit(f"sidebar: {problem}")
    (NBS / "sidebar.yml").write_text(text, encoding="utf-8")
