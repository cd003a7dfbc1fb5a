"""How the code reads, in numbers: what CONTRIBUTING promises of the exported modules, measured.

    python tools/measure.py              print the table
    python tools/measure.py --against R  print it beside that of an older revision
    python tools/measure.py --check      fail where a promise is broken

A body line is a line of a function that is not blank. A statement is a node of the syntax tree, docstrings left out.
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOOPS = "zero_grad"  # what every training loop calls

# A package may import from itself and from what stands before it.
LAYERS = (
    ("core", "files", "values", "records", "processes"),
    ("geometry", "kernels"),
    ("backbones", "image", "losses", "gaussians", "released"),
    ("fusion", "render", "volume", "photograph", "viewer", "formats"),
    ("rasterization",),
    ("objective",),
    ("data",),
    ("worlds",),
    ("runs",),
    ("tasks",),
    ("recipes",),
    ("features",),
    ("predictions", "reproduce", "view"),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
SHARED = {"heads", "metrics", "scenes"}  # in tasks: what siblings may import


def modules(package):
    "Every module of a package and its text, by its dotted name below the package."
    for path in sorted(Path(package).rglob("*.py")):
        if path.name in ("__init__.py", "__main__.py", "_modidx.py", "_options.py"):
            continue
        yield (
            ".".join(path.relative_to(package).with_suffix("").parts),
            path.read_text(encoding="utf-8"),
        )


def without_docstrings(tree):
    "The statements of a tree, docstrings left out."
    docs = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            docs.add(body[0])
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node not in docs]


def exported_names(tree):
    "The lines of `__all__`, which nbdev writes and folds in its own way."
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from range(node.lineno, node.end_lineno + 1)


def measure(package):
    "The numbers of a package."
    found = dict.fromkeys(("lines", "body lines", "characters", "over 120", "over 160"), 0)
    found |= dict.fromkeys(("two statements", "statements", "loops"), 0)
    for _, text in modules(package):
        tree = ast.parse(text)
        lines = text.splitlines()
        statements = without_docstrings(tree)
        starts = [node.lineno for node in statements]
        body = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body.update(range(node.body[0].lineno, node.end_lineno + 1))
        body = [lines[n - 1].strip() for n in body if lines[n - 1].strip()]
        found["lines"] += sum(bool(line.strip()) for line in lines)
        found["body lines"] += len(body)
        found["characters"] += sum(map(len, body))
        skipped = set(exported_names(tree))
        widths = [len(line) for n, line in enumerate(lines, 1) if n not in skipped]
        found["over 120"] += sum(width > 120 for width in widths)
        found["over 160"] += sum(width > 160 for width in widths)
        found["two statements"] += len(starts) - len(set(starts))
        found["statements"] += len(statements)
        found["loops"] += text.count(f".{LOOPS}()")
    return {
        "non-blank lines": found["lines"],
        "statements": found["statements"],
        "characters a body line": round(found["characters"] / found["body lines"], 1),
        "lines over 120 (%)": round(100 * found["over 120"] / found["lines"], 2),
        "lines over 160": found["over 160"],
        "two statements a line": found["two statements"],
        "training loops": found["loops"],
    }


def imported(module, text):
    "The modules of the package that a module imports, at any depth, below the package."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ["unipre3d", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.startswith("unipre3d."):
                yield name.removeprefix("unipre3d.")


def wrong_imports(package):
    "Each import that points forwards, from a task to a sibling, or from a model to a data set."
    known = {name for name, _ in modules(package)}
    for module, text in modules(package):
        room = module.split(".")[0]
        for other in sorted(set(imported(module, text)) & known):
            there = other.split(".")[0]
            if RANK[there] > RANK[room]:
                yield f"{module} imports {other}, which stands behind it"
            if room == there == "tasks" and other.split(".")[1] not in SHARED and other != module:
                yield f"{module} imports its sibling {other}"


PROMISES = {
    "characters a body line": 50,
    "lines over 120 (%)": 0.5,
    "lines over 160": 0,
    "two statements a line": 100,
    "training loops": 1,
}


def broken(package):
    "Each promise that the package does not keep, one line each."
    found = measure(package)
    for name, limit in PROMISES.items():
        if found[name] > limit:
            yield f"{name}: expected at most {limit}, found {found[name]}"
    yield from wrong_imports(package)


def old_package(revision):
    "The package of another revision, in a temporary folder."
    import tempfile

    folder = Path(tempfile.mkdtemp())
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "unipre3d"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "unipre3d"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="an older revision to print beside")
    parser.add_argument("--check", action="store_true", help="fail where a promise is broken")
    args = parser.parse_args()
    columns = {"now": measure(ROOT / "unipre3d")}
    if args.against:
        columns[args.against] = measure(old_package(args.against))
    print(f"{'':26}" + "".join(f"{name:>12}" for name in columns))
    for name in columns["now"]:
        print(f"{name:26}" + "".join(f"{column[name]:>12}" for column in columns.values()))
    faults = list(broken(ROOT / "unipre3d"))
    for fault in faults:
        print(fault)
    sys.exit(bool(args.check and faults))


if __name__ == "__main__":
    main()
