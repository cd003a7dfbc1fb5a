"""The options of commands whose values need torch, unipre3d/_options.py, from the recipes themselves.

Help and mistakes read this file, so that they need not import torch. A test compares it with the recipes.

    python tools/options.py            write unipre3d/_options.py
"""

import ast
import functools
import inspect
import io
import re
import sys
import textwrap
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "unipre3d" / "_options.py"
sys.path.insert(0, str(ROOT))

PLAIN = {
    "render": "RenderOptions",
    "features": "FeatureOptions",
    "predict": "PredictOptions",
    "view": "ViewOptions",
    "data prepare": "PrepareOptions",
    "data check": "CheckOptions",
    "data shard": "ShardOptions",
    "data furniture": "FurnitureOptions",
    "data autoencoder": "AutoencoderOptions",
}  # command -> its options, in unipre3d.cli

HEAD = '''"""The options of commands whose values need torch; tools/options.py writes this file from the recipes."""

# A row is the option's path, its type, its default as text, and what it is.
'''


def comment_lines(text):
    "Number of a line, from 1 -> the comment in it."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


@functools.cache
def comments(kind):
    "Name of a field -> the comments beside it, over all classes that a dataclass inherits from."
    found = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        text = inspect.getsource(base)
        lines = comment_lines(text)
        alone = {n for n in lines if text.splitlines()[n - 1].lstrip().startswith("#")}
        for node in ast.parse(text).body[0].body:
            if isinstance(node, ast.AnnAssign):
                beside = [lines[n] for n in range(node.lineno, node.end_lineno + 1) if n in lines]
                above = [lines[node.lineno - 1]] if node.lineno - 1 in alone else []
                found[node.target.id] = " ".join(beside or above)
    return found


@functools.cache
def keyword_comments(backbone):
    "Keyword of a backbone's constructor -> the comment beside it."
    from unipre3d.runs.run import backbone_class

    text = textwrap.dedent(inspect.getsource(backbone_class(backbone).__init__))
    lines = comment_lines(text)
    build = ast.parse(text).body[0]
    arguments = [*build.args.args, *build.args.kwonlyargs]
    ends = [argument.lineno for argument in arguments[1:]] + [build.body[0].lineno]
    found = {}
    for argument, end in zip(arguments, ends):
        beside = [lines[n] for n in range(argument.lineno, end) if n in lines]
        found[argument.arg] = " ".join(beside)
    return found


def as_text(value):
    "A default as it would be typed."
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return repr(value) if value == "" else str(value)


def keyword_rows(backbone, chosen):
    "The options of a backbone's constructor; the defaults are its own where a recipe has chosen no other."
    from unipre3d.cli import backbone_keywords

    about = keyword_comments(backbone)
    for name, (_, default) in backbone_keywords(backbone).items():
        kind = keyword_type(backbone, name)
        yield keyword_path(name), kind, as_text(chosen.get(name, default)), about[name]


def rows(values, prefix=""):
    "The rows of an instance of nested dataclasses."
    said = comments(type(values))
    for value in fields(values):
        renamed = re.search(r"called\(.(\w+).\)", str(value.type))
        path = prefix + (renamed[1] if renamed else value.name.replace("_", "-"))
        inner = getattr(values, value.name)
        if is_dataclass(inner):
            yield from rows(inner, path + ".")
        elif value.name == "backbone_options":
            yield from keyword_rows(values.backbone, inner)
        elif isinstance(inner, dict):
            for name, weight in inner.items():
                yield f"{path}.{name}", "float", as_text(weight), said[value.name]
        else:
            kind = "str" if renamed else str(value.type)
            yield path, kind, as_text(inner), said[value.name]


def keyword_path(name):
    return f"model.backbone-options.{name.replace('_', '-')}"


def keyword_type(backbone, name):
    from unipre3d.runs.run import backbone_class

    kind = inspect.signature(backbone_class(backbone).__init__).parameters[name].annotation
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def collect() -> dict[str, Any]:
    "What the file holds."
    from unipre3d import cli
    from unipre3d.cli import RunOptions, with_all_terms
    from unipre3d.data.imports import ImportOptions
    from unipre3d.recipes import finetune_recipes, recipes
    from unipre3d.reproduce.run import StudyOptions
    from unipre3d.worlds.rooms.disk import RoomsOptions

    known = {"pretrain": recipes, "finetune": finetune_recipes}
    whole = {}
    backbones = {}
    for name, recipe in (recipes | finetune_recipes).items():
        whole[name] = [*rows(with_all_terms(recipe)), *rows(RunOptions())]
        backbone = getattr(recipe.model, "backbone", None)
        if backbone and backbone not in backbones:
            backbones[backbone] = list(keyword_rows(backbone, {}))
    whole["data rooms"] = list(rows(RoomsOptions()))
    whole["data import"] = list(rows(ImportOptions()))
    whole["reproduce"] = list(rows(StudyOptions()))
    for name, kind in PLAIN.items():
        whole[name] = list(rows(getattr(cli, kind)()))
    distinct = sorted({row for own in [*whole.values(), *backbones.values()] for row in own})
    number = {row: n for n, row in enumerate(distinct)}
    return {
        "ABOUT": {command: {k: r.about for k, r in own.items()} for command, own in known.items()},
        "ROWS": distinct,
        "OPTIONS": {name: [number[row] for row in own] for name, own in whole.items()},
        "BACKBONES": {name: [number[row] for row in own] for name, own in backbones.items()},
    }


def text() -> str:
    "The file."
    parts = [
        f"{name} = {pformat(value, width=110, compact=True, sort_dicts=False)}"
        for name, value in collect().items()
    ]
    return HEAD + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
