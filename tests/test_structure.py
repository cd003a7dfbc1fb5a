"""What the repository promises about its own shape: order of modules, lessons beside code, clean pages.

Each failure is one line that names the notebook and what is missing."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from build_site import options  # noqa: E402
from measure import broken  # noqa: E402
from sidebar import CORE, check_order, pages, sidebar  # noqa: E402

NOTEBOOKS = sorted(
    (p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts),
    key=lambda p: p.name,
)


def names(paths):
    return [str(p.relative_to(ROOT / "nbs")) for p in paths]


def cells(path):
    "Every cell as (kind, directives without a value, options, code)."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        opts, others, code = options(text) if cell["cell_type"] == "code" else ({}, [], text)
        yield cell["cell_type"], [o.split() for o in others if o.split()], opts, code


def tree(code):
    "The cell's syntax tree, with shell and magic lines taken out."
    return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", code))


def module_of(path):
    "The module that a notebook exports, or None."
    for kind, directives, _, _ in cells(path):
        for d in directives if kind == "code" else []:
            if d[0] == "default_exp":
                return d[1]


ORDER = {module_of(p): n for n, p in enumerate(NOTEBOOKS) if module_of(p)}


def complain(problems):
    "Fail with one line for each problem."
    problems = list(problems)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


# ---------------------------------------------------------------- order


def test_the_package_keeps_what_contributing_promises():
    "Layers, siblings that do not import each other, one training loop, widths of lines."
    complain(broken(ROOT / "unipre3d"))


def test_a_broken_promise_is_named(tmp_path):
    (tmp_path / "tasks").mkdir()
    wide = "x = 1  # " + "w" * 160
    (tmp_path / "core.py").write_text("from unipre3d.tasks.parts import a\n" + wide + "\n")
    (tmp_path / "tasks" / "parts.py").write_text("from .masked import b\n")
    loop = "def train(adamw):\n    adamw.zero_grad()\n    adamw.zero_grad()\n"
    (tmp_path / "tasks" / "masked.py").write_text("__all__ = ['" + "n" * 160 + "']\n" + loop)
    found = list(broken(tmp_path))
    assert "core imports tasks.parts, which stands behind it" in found
    assert "tasks.parts imports its sibling tasks.masked" in found
    assert "training loops: expected at most 1, found 2" in found
    assert "lines over 160: expected at most 0, found 1" in found  # __all__ does not count


def test_modules_belong_to_a_notebook():
    modules = {
        ".".join(p.relative_to(ROOT / "unipre3d").with_suffix("").parts)
        for p in (ROOT / "unipre3d").rglob("*.py")
    }
    modules = {
        m
        for m in modules
        if not m.endswith("__init__") and m not in ("_modidx", "_options", "__main__")
    }
    used = "\n".join(p.read_text(encoding="utf-8") for p in NOTEBOOKS)
    complain(
        f"unipre3d.{m}: no notebook exports it or imports it; a dense kernel needs a chapter that teaches it"
        for m in sorted(modules - set(ORDER))
        if f"unipre3d.{m}" not in used
        and f"from unipre3d.{m.rpartition('.')[0]} import {m.rpartition('.')[2]}" not in used
    )


# ---------------------------------------------------------------- lessons


def public_definitions(code):
    return [
        n.name
        for n in tree(code).body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not n.name.startswith("_")
    ]


def mentions(code):
    "Every name and attribute that a cell uses."
    try:
        nodes = list(ast.walk(tree(code)))
    except SyntaxError:
        return set(re.findall(r"\w+", code))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_every_exported_name_is_run_within_two_cells(path):
    code_cells = [c for c in cells(path) if c[0] == "code"]

    def unseen():
        for n, (_, directives, _, code) in enumerate(code_cells):
            if not any(d[0] in ("export", "exports") for d in directives):
                continue
            near = set().union(*(mentions(c[3]) for c in code_cells[n : n + 3]))
            for name in public_definitions(code):
                if name not in near:
                    yield f"{path.name}: {name} is exported but not run in its own or the next two code cells"

    complain(unseen())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_first_cell_is_title_and_description(path):
    kind, _, _, text = next(cells(path))
    lines = text.strip().split("\n")
    if kind != "markdown" or not lines[0].startswith("# "):
        complain([f"{path.name}: the first cell must be Markdown that starts with '# Title'"])
    if len(lines) < 3 or lines[1] or not lines[2].startswith("> "):
        complain(
            [
                f"{path.name}: the title must be followed by an empty line and '> one line of description'"
            ]
        )
    if len(lines) > 3:
        complain(
            [f"{path.name}: the first cell holds more than title and description; start a new cell"]
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_page_opens_and_closes_for_the_reader(path):
    texts = [text.strip() for kind, _, _, text in cells(path) if kind == "markdown"]
    opening, closing = " ".join(texts[1:2]).split("\n\n")[0], texts[-1].split("\n\n")[-1]

    def missing():
        if path.stem != "index":  # the landing page is what the others are learned from
            found = [
                opening.lower().find(words) for words in ("you will learn", "it needs", "it runs")
            ]
            if -1 in found or found != sorted(found):
                yield f"{path.name}: the first paragraph must say 'You will learn ...', 'It needs ...' and 'It runs ...', in this order"
        if not re.search(r"\b[Nn]ext\b", closing) or "](" not in closing:
            yield f"{path.name}: the last paragraph must say what comes next, with a link: '{closing[:60]}'"

    complain(missing())


# ---------------------------------------------------------------- one walk through the book


def walk():
    "The pages in the order of the sidebar."
    return [
        ROOT / "nbs" / name
        for name in re.findall(
            r"- (\S+\.ipynb)", (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8")
        )
    ]


def links(path, text):
    "The pages that a text of this page links to."
    return [(path.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.ipynb)\)", text)]


def markdown(path):
    return [text for kind, _, _, text in cells(path) if kind == "markdown"]


def test_sidebar_is_the_one_that_the_tool_writes():
    assert (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8") == sidebar() and sorted(
        walk()
    ) == sorted(NOTEBOOKS)


def test_a_notebook_in_no_section_is_an_error():
    order = [path for _, _, path in pages()]
    check_order(order, order)
    for found, listed, problem in (
        ([*order, Path("new.ipynb")], order, "new.ipynb: pages that stand in no section"),
        (order[1:], order, f"{order[0]}: pages that stand .* have no notebook"),
        (order, [*order, order[0]], f"{order[0]}: pages that stand .* twice"),
    ):
        with pytest.raises(ValueError, match=problem):
            check_order(found, listed)


def word_count(text):
    "Words that are read: no code, no mathematics, no addresses of links."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "", text)
    return len(re.findall(r"\S*\w\S*", text))


def test_core_is_an_evening():
    "At most 15 pages and 12,000 words; the first Gaussian comes before any file layout."
    core = [ROOT / "nbs" / f"{name}.ipynb" for names in CORE.values() for name in names]
    words = {path.name: sum(map(word_count, markdown(path))) for path in core}
    assert core == walk()[: len(core)]
    assert len(core) <= 15
    assert sum(words.values()) <= 12_000, words
    before = walk()[: walk().index(ROOT / "nbs" / "50_gaussians.ipynb")]
    assert not [p for p in before if p.parent.name in ("data", "worlds") or p.stem == "59_run"]


@pytest.mark.parametrize(
    "path, after", list(zip(walk(), [*walk()[1:], walk()[0]])), ids=names(walk())
)
def test_next_leads_to_the_page_below_in_the_sidebar(path, after):
    closing = markdown(path)[-1].split("\n\n")[-1]
    first = links(path, closing[re.search(r"\b[Nn]ext\b|$", closing).end() :])[:1]
    if first != [after]:
        complain(
            [
                f"{path.name}: the first link after 'Next' must be {after.name}, the page below in nbs/sidebar.yml; it is {first[0].name if first else 'missing'}"
            ]
        )


def test_table_of_the_landing_page_walks_the_sidebar():
    landing = walk()[0]
    rows = [
        line for text in markdown(landing) for line in text.split("\n") if line.startswith("| [")
    ]
    assert links(landing, "\n".join(line.split("|")[1] for line in rows)) == walk()[1:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_imports_stand_in_cells_of_their_own(path):
    def mixed():
        for kind, _, _, code in cells(path):
            if kind != "code" or "nbdev_export(" in code:
                continue
            body = [
                n
                for n in tree(code).body
                if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ]
            imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
            if imports and any(isinstance(n, (ast.Expr, ast.Assign)) for n in body):
                yield f"{path.name}: a cell mixes imports with other code: {ast.unparse(imports[0])}"

    complain(mixed())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_figures_have_label_caption_and_alt_text(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    seen = set()

    def wanting():
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            opts, others, code = options("".join(cell["source"]))
            drawn = any(
                "image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {})
                for o in cell["outputs"]
            )
            label = str(opts.get("label", ""))
            if label in seen:
                yield f"{path.name}: the label {label} is used twice"
            seen.add(label) if label else None
            if "hide" in others or opts.get("include") is False:
                continue
            for key, rule in (
                ("label", label.startswith("fig-")),
                ("fig-cap", opts.get("fig-cap")),
                ("fig-alt", opts.get("fig-alt")),
            ):
                if (drawn or label.startswith("fig-")) and not rule:
                    yield f"{path.name}: a figure without {key}: {(label or code.strip().splitlines()[0])[:60]}"

    complain(wanting())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_has_no_error_and_no_leftover_warning(path):
    def faults():
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            for out in cell.get("outputs", []):
                if out["output_type"] == "error":
                    yield f"{path.name}: cell {n} holds an error output: {out['ename']}"
                if out.get("name") == "stderr" and "Warning" in "".join(out["text"]):
                    yield f"{path.name}: cell {n} shows a warning: {''.join(out['text']).strip().splitlines()[0][:80]}"

    complain(faults())


# ---------------------------------------------------------------- the whole repository


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if (
            path.is_file()
            and not path.is_symlink()
            and path.suffix
            not in (".png", ".npz", ".safetensors", ".zip", ".gz", ".xz", ".gif", ".ply")
        ):
            yield path


LOCAL = re.compile(
    r"(?<![\w./-])/(?:"
    + "|".join(["ro" + "ot", "wo" + "rk", "ho" + "me/\\w+", "Us" + "ers/\\w+"])
    + r")/[\w.-]+|/tmp/tmp\w+"
)
HOSTS = re.compile(
    "|".join(
        re.escape(h)
        for h in (
            "py" + "pi.org",
            "files.python" + "hosted.org",
            "registry.npm" + "js.org",
            "npm" + "js.com",
            "download.py" + "torch.org",
            "deb.deb" + "ian.org",
        )
    )
)


def test_no_machine_path_and_no_registry_host():
    def found():
        for path in tracked():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            for what, rule in (
                ("a path of one machine", LOCAL),
                ("the host of a package registry", HOSTS),
            ):
                for match in sorted(set(rule.findall(text)))[:3]:
                    yield f"{path.relative_to(ROOT)}: names {what}: {match}"

    complain(found())


def test_readme_agrees_with_the_landing_page():
    if not (ROOT / "nbs" / "index.ipynb").exists():
        pytest.skip("no landing page yet")
    from readme import differences

    complain(differences())


def test_every_page_can_be_reached_from_the_landing_page():
    text = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    complain(
        f"nbs/index.ipynb: 'Where to read' has no link to {name}"
        for name in names(NOTEBOOKS)
        if name != "index.ipynb" and f"]({name})" not in text
    )


def test_spelling():
    from spelling import doubts

    assert list(doubts([("p", "It reci" + "eves colors of a `color` and of colour.", True)])) == [
        "p: reci" + "eves, perhaps receives",
        "p: colors; this book writes colours",
    ]
    complain(doubts())


def test_constraints_pin_every_requirement():
    from configparser import ConfigParser

    cfg = ConfigParser()
    cfg.read(ROOT / "settings.ini")
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        w
        for key in ("requirements", "dev_requirements", "docs_requirements")
        for w in cfg["DEFAULT"][key].split()
    ]
    complain(
        f"constraints.txt: no pin for {name}"
        for name in sorted(
            {re.split(r"[<>=;\[!~]", w)[0].lower().replace("_", "-") for w in wanted} - pinned
        )
    )


DISTRIBUTION = {"PIL": "pillow", "spconv": "spconv-cu126", "cumm": "spconv-cu126"}


EXTRAS = (
    "gpu",
    "worlds",
    "prepare",
    "clouds",
    "vision",
    "trackers",
    "view",
)  # of what a user may install beside the package


def test_package_imports_only_what_it_requires():
    from configparser import ConfigParser

    cfg = ConfigParser()
    cfg.read(ROOT / "settings.ini")

    def required(*keys):
        return {
            re.split(r"[<>=;\[!~]", w)[0].lower()
            for key in keys
            for w in cfg["DEFAULT"][key].split()
        }

    always, optional = (
        required("requirements"),
        required("requirements", *(f"{extra}_requirements" for extra in EXTRAS)),
    )

    def modules(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (a.name.split(".")[0] for a in node.names)
            if isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.split(".")[0]

    def wrong():
        for path in sorted((ROOT / "unipre3d").rglob("*.py")):
            if path.name == "_modidx.py":
                continue
            body = ast.parse(path.read_text(encoding="utf-8"))
            top = set(modules(body.body))
            for module in sorted(set(modules(ast.walk(body)))):
                name = DISTRIBUTION.get(module, module).lower()
                if (
                    module in sys.stdlib_module_names
                    or module == "unipre3d"
                    or name in always
                    or (module not in top and name in optional)
                ):
                    continue
                yield f"{path.relative_to(ROOT)}: imports {module}, which settings.ini does not require{' at run time' if name in optional else ''}"

    complain(wrong())


def test_signatures_can_be_documented():
    "The site evaluates the annotations of every public name in its own module; a field inherited from another module may name what that module alone imports."
    import importlib
    import inspect

    broken = []
    for path in sorted((ROOT / "unipre3d").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", ()):
            if (
                not callable(thing := getattr(module, key))
                or getattr(thing, "__module__", "") != name
            ):
                continue
            try:
                inspect.signature(thing, eval_str=True)
            except NameError as error:
                broken.append(f"{name}.{key}: {error}")
            except (TypeError, ValueError):
                pass  # no signature to read
    assert not broken, "\n".join(broken)


def packaged():
    "Every module of the package by its dotted name."
    import importlib

    for path in sorted((ROOT / "unipre3d").rglob("*.py")):
        if path.name not in ("_modidx.py", "__main__.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            yield name, importlib.import_module(name)


def undocumented(name, thing):
    "A function, or a class and its public methods, that have no docstring of their own."
    import inspect

    if not (thing.__doc__ or "").strip() or thing.__doc__.startswith(f"{thing.__name__}("):
        yield name  # a dataclass without one has its signature there
    if not inspect.isclass(thing):
        return
    for key, value in vars(thing).items():
        method = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if key.startswith("_") or not inspect.isfunction(method):
            continue
        if not (inspect.getdoc(getattr(thing, key)) or "").strip():
            yield f"{name}.{key}"


def test_every_public_name_has_a_docstring():
    def missing():
        for name, module in packaged():
            kinds = (ast.FunctionDef, ast.ClassDef)
            body = ast.parse(Path(module.__file__).read_text()).body
            defined = {node.name for node in body if isinstance(node, kinds)}
            for key in getattr(module, "__all__", ()):
                thing = getattr(module, key)
                known = key in defined and thing.__module__ == name
                if known:  # names of a list, such as those of an IntEnum, say what they are
                    for found in undocumented(f"{name}.{key}", thing):
                        yield f"{found}: expected a docstring"

    complain(missing())


def test_values_of_a_recipe_have_names_of_their_own():
    "A value is given by its last name, so no two groups of a recipe may share one."
    from collections import Counter
    from dataclasses import fields

    from unipre3d.cli import RunOptions
    from unipre3d.recipes import KINDS

    def twice():
        for kind in KINDS.values():
            recipe = kind()
            values = [f.name for g in fields(kind)[1:] for f in fields(getattr(recipe, g.name))]
            values += [f.name for f in fields(RunOptions)] + ["about", "data"]
            for name, count in Counter(values).items():
                if count > 1:
                    yield f"{kind.__name__}: {name} is the name of {count} values"

    complain(twice())


# ---------------------------------------------------------------- hosted workflows

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(name):
    import yaml

    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflow_is_well_formed(path):
    flow, targets = (
        workflow(path.name),
        set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)),
    )

    def wrong():
        if not {"name", True, "permissions", "jobs"} <= flow.keys():
            yield f"{path.name}: expected name, on, permissions and jobs, found {list(flow)}"  # YAML reads `on` as true
        for name, job in flow["jobs"].items():
            for need in (
                [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
            ):
                if need not in flow["jobs"]:
                    yield f"{path.name}: the job {name} needs {need}, which is no job"
            if "timeout-minutes" not in job:
                yield f"{path.name}: the job {name} has no limit of time"
            for step in job["steps"]:
                if ("uses" in step) == ("run" in step):
                    yield f"{path.name}: a step of {name} must have one of uses and run: {step}"
                if "uses" in step and not re.fullmatch(
                    r"[\w-]+/[\w/-]+@v\d+(\.\d+)*", step["uses"]
                ):
                    yield f"{path.name}: {step['uses']} names no version"
                for target in re.findall(r"\bmake (\w+)", step.get("run", "")):
                    if target not in targets:
                        yield f"{path.name}: runs make {target}, which the Makefile does not have"
                for script in re.findall(r"[\w./-]+\.(?:py|sh)\b|\.ci/run", step.get("run", "")):
                    if not (ROOT / script).exists():
                        yield f"{path.name}: runs {script}, which does not exist"

    complain(wrong())


def test_workflows_test_four_pythons_and_publish_with_quarto():
    tested = workflow("test.yml")["jobs"]
    versions = tested["test"]["strategy"]["matrix"]["python"]
    # text: a bare 3.10 would be the number 3.1
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    systems = tested["commands"]["strategy"]["matrix"]["system"]
    assert systems == ["macos-latest", "windows-latest", "ubuntu-latest"]
    jobs = workflow("docs.yml")["jobs"]
    steps = [s for s in jobs["build"]["steps"]]
    assert any(s.get("uses", "").startswith("quarto-dev/quarto-actions/setup@") for s in steps)
    assert any("tools/build_site.py" in s.get("run", "") and "--quarto" in s["run"] for s in steps)
    assert (
        any(s.get("uses", "").startswith("actions/deploy-pages@") for s in jobs["publish"]["steps"])
        and jobs["publish"]["needs"] == "build"
    )
