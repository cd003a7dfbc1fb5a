"""Build the documentation site into `_docs/` from executed notebooks, to be read without a network.

    python tools/build_site.py [--no-run] [--keep] [--quarto]

The notebooks are plain nbdev sources. With `--quarto` the Quarto program renders them, as for the published book;
every link is checked in the same way. Without it, no program is needed that the package index does not have: run the
notebooks (tools/run_notebooks.py), let nbdev write the reference entries, number figures and equations, render with
smalldocs, bring the scripts that pages need beside them, and check every page.
"""

import argparse
import ast
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from run_notebooks import OUT, ROOT, notebooks
from sidebar import pages as book
from sidebar import sidebar as contents

STAGE, SITE = OUT / "book", ROOT / "_docs"
KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation"}
REFERENCE = re.compile(r"(?<![\w`@])@((?:fig|tbl|eq|sec)-[\w-]*\w)")
EQUATION = re.compile(r"\$\$(?P<tex>(?:(?!\$\$).)+?)\$\$[ \t]*\{#(?P<id>eq-[\w-]+)\}", re.S)
HEADING = re.compile(r"^#+ (?P<text>.*?)\s*\{#(?P<id>sec-[\w-]+)\}\s*$", re.M)


def fail(message):
    sys.exit(f"build_site: {message}")


# ---------------------------------------------------------------- notebooks


def source(cell):
    return "".join(cell["source"])


def options(text):
    "The `#| key: value` lines at the top of a cell, its other directives, and the code below them."
    lines, pairs, others = text.split("\n"), [], []
    while lines and lines[0].startswith("#|"):
        line = lines.pop(0)[2:]
        continued = pairs and line.startswith("  ")
        (pairs if continued or re.match(r"\s*[\w-]+:(\s|$)", line) else others).append(
            line[1:] if line.startswith(" ") else line
        )
    return (yaml.safe_load("\n".join(pairs)) or {} if pairs else {}), others, "\n".join(lines)


def with_options(opts, others, code):
    "The cell's text again, with its options as one line each."
    head = [f"#| {k}: {json.dumps(v, ensure_ascii=False)}" for k, v in opts.items()]
    return "\n".join([*(f"#| {o}" for o in others), *head, code])


def defines_something(code):
    "Whether a cell has more than imports: a function, a class, a constant."
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return any(
        not isinstance(node, (ast.Import, ast.ImportFrom))
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in body
    )


def show_source(cell):
    "Exported code is part of the chapter: ask nbdev to keep it, below the reference entry, instead of hiding it."
    opts, others, code = options(source(cell))
    if cell["cell_type"] != "code" or not defines_something(code):
        return
    others = ["exports" + o[len("export") :] if re.match(r"export(\s|$)", o) else o for o in others]
    cell["source"] = with_options(opts, others, code)


def stage():
    "Lay out a copy of the project with executed notebooks, for nbdev to work in."
    shutil.rmtree(STAGE, ignore_errors=True)
    nbs = STAGE / "nbs"
    shutil.copytree(ROOT / "nbs", nbs, ignore=shutil.ignore_patterns("*.ipynb", ".*", "_*"))
    for path in notebooks():
        if not (OUT / path).exists():
            fail(f"{OUT.name}/{path} is missing; run without --no-run")
        notebook = json.loads((OUT / path).read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            show_source(cell)
        (nbs / path).parent.mkdir(parents=True, exist_ok=True)
        (nbs / path).write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copy(ROOT / "_quarto.yml", nbs / "_quarto.yml")
    shutil.copy(ROOT / "settings.ini", STAGE)
    (STAGE / "unipre3d").symlink_to(ROOT / "unipre3d", target_is_directory=True)


def process():
    "nbdev's own steps of `nbdev_docs`, without the Quarto program: reference entries, hidden cells, links between names."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    os.chdir(STAGE)
    refresh_quarto_yml()
    proc_nbs(path="nbs", force=True, n_workers=min(2, os.cpu_count() or 1))


# ---------------------------------------------------------------- numbers and references


def front_matter(notebook):
    first = notebook["cells"][0]
    found = (
        re.match(r"---\n(.*?)\n---", source(first), re.S) if first["cell_type"] == "raw" else None
    )
    return yaml.safe_load(found[1]) if found else {}


def page_names(pages):
    "Where each notebook goes: nbdev's `output-file` (the module's name) instead of the numbered file name."
    return {
        path: path.with_name(front_matter(nb).get("output-file", path.name)).with_suffix(".ipynb")
        for path, nb in pages.items()
    }


def number(pages, names):
    "Give each figure, table and equation its number on its page; return what each label refers to."
    labels = {}
    for path, notebook in pages.items():
        counts, page, title = (
            dict.fromkeys(KINDS, 0),
            names[path],
            front_matter(notebook).get("title", path.stem),
        )

        def take(label, kind):
            if label in labels:
                fail(
                    f"{path}: the label {label} is used twice; every label needs a name of its own"
                )
            counts[kind] += 1
            labels[label] = (page, title, f"{KINDS[kind]} {counts[kind]}")
            return counts[kind]

        def equation(match):
            return f"\n::: {{#{match['id']}}}\n$$\n{match['tex'].strip()} \\tag{{{take(match['id'], 'eq')}}}\n$$\n:::\n"

        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = EQUATION.sub(equation, source(cell))
                for heading in HEADING.finditer(cell["source"]):
                    labels[heading["id"]] = (page, title, heading["text"])
            elif cell["cell_type"] == "code":
                opts, others, code = options(source(cell))
                kind = str(opts.get("label", "")).split("-")[0]
                if kind in ("fig", "tbl"):
                    caption = f"{kind}-cap"
                    opts[caption] = (
                        f"{KINDS[kind]} {take(opts['label'], kind)}: {opts.get(caption, '')}"
                    )
                    if kind == "fig" and "code-fold" not in opts:
                        opts |= {"code-fold": True, "code-summary": "Code of this figure"}
                others = [o for o in others if not re.match(r"exports?(\s|$)|label", o)]
                if kind == "fig":
                    interactive_figure(cell, opts)
                cell["source"] = with_options(opts, [], code)
    return labels


def interactive_figure(cell, opts):
    "A figure that is HTML instead of a picture: a frame with its caption around it, since the renderer captions pictures only."
    drawn = [o for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
    if len(drawn) != 1 or any(
        k.startswith("image/") for o in cell["outputs"] for k in o.get("data", {})
    ):
        return
    label, caption = opts.pop("label"), html.escape(opts.pop("fig-cap"))
    opts.pop("fig-alt", None)
    drawn[0]["data"]["text/html"] = (
        f'<figure class="figure" id="{label}">{"".join(drawn[0]["data"]["text/html"])}<figcaption>{caption}</figcaption></figure>'
    )


def outside_code(text, change):
    "Apply `change` to Markdown, but not to fenced blocks or to code in backticks."
    parts = re.split(r"(^```.*?^```\s*?$|`[^`\n]+`)", text, flags=re.S | re.M)
    return "".join(part if n % 2 else change(part) for n, part in enumerate(parts))


def refer(pages, names, labels, base_url, git_url):
    "Turn `@fig-x` into links, names of notebooks into names of pages, and links to the published site into local ones."
    problems = []
    for path, notebook in pages.items():
        page, here = names[path], posixpath.dirname(str(names[path]))

        def reference(match):
            if match[1] not in labels:
                problems.append(
                    f"nbs/{path}: @{match[1]} refers to nothing; no cell has that label"
                )
                return match[1]
            target, title, text = labels[match[1]]
            return (
                f"[{text}](#{match[1]})"
                if target == page
                else f"[{text} of {title}]({posixpath.relpath(str(target), here or '.')}#{match[1]})"
            )

        def other(match):
            target = Path(posixpath.normpath(posixpath.join(str(path.parent), match[1])))
            if target not in names:
                problems.append(f"nbs/{path}: links to {match[1]}, which is not a notebook here")
                return "](#)"
            return f"]({posixpath.relpath(str(names[target]), here or '.')}{match[2] or ''})"

        def local(match):
            target, anchor = match[1].removesuffix(".html") + ".ipynb", match[2] or ""
            return posixpath.relpath(target, here or ".") + anchor

        def code_page(match):
            return posixpath.relpath(f"source/{match[1]}.qmd", here or ".") + (
                match[2] or ""
            ).replace("#L", "#line-")

        def links(text):
            text = re.sub(r"\]\((?!\w+:)([^)#\s]+\.ipynb)(#[^)\s]*)?\)", other, text)
            text = re.sub(rf"{re.escape(base_url)}/([\w/.-]+\.html)(#[\w.-]+)?", local, text)
            text = re.sub(
                rf"{re.escape(git_url)}/blob/\w+/(unipre3d/[\w/]+)\.py(#L\w+)?", code_page, text
            )
            return text.replace(
                '{target="_blank" style="float:right; font-size:smaller"}', "{.source-link}"
            )

        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = outside_code(
                    links(source(cell)), lambda text: REFERENCE.sub(reference, text)
                )
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = links(
                        "".join(output["data"]["text/markdown"])
                    )
    return problems


def code_pages(folder):
    "One page for each module of the package, so that a reference entry's source link works without a network."
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    style = HtmlFormatter(
        linenos="inline", lineanchors="line", anchorlinenos=True, cssclass="module-source"
    )
    colours = "\n".join(
        f"{scope} .module-source {rule}"
        for scope, name in (("html:not(.quarto-dark)", "xcode"), ("html.quarto-dark", "native"))
        for rule in HtmlFormatter(style=name).get_style_defs("").splitlines()
        if re.match(r"\s*\.\w", rule)
    )
    for module in sorted((ROOT / "unipre3d").rglob("*.py")):
        if module.name in ("__init__.py", "_modidx.py", "_options.py"):
            continue
        name = module.relative_to(ROOT).with_suffix("")
        body = highlight(module.read_text(encoding="utf-8"), PythonLexer(), style)
        page = folder / "source" / name.with_suffix(".qmd")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            f'---\ntitle: "{".".join(name.parts)}"\ndescription: The module as exported\nsearch: false\ntoc: false\n---\n\n````````{{=html}}\n<style>\n{colours}\n</style>\n{body}\n````````\n',
            encoding="utf-8",
        )


def is_entry(cell):
    return cell["cell_type"] == "code" and "show_doc(" in source(cell)


def place(entry, code):
    "Where the name of an entry is defined in the source, to keep the order in which it is read."
    name = re.search(r"show_doc\(([\w.]+)", source(entry))[1]
    found = re.search(rf"^\s*(?:def|class) {re.escape(name.split('.')[-1])}\b", code, flags=re.M)
    return found.start() if found else len(code)


def arrange_entries(notebook, longest=40):
    """A cell that defines several names: all reference entries first, then the source once. A short source is shown, and
    its entries keep only their headings, since signature and comments stand right below; a longer one is folded."""
    cells, done = notebook["cells"], []
    while cells:
        block = [cells.pop(0)]
        exported = block[0]["cell_type"] == "code" and 'code-summary: "Exported source"' in source(
            block[0]
        )
        if exported or is_entry(
            block[0]
        ):  # nbdev puts the first entry before the source, the others behind it
            while cells and (
                is_entry(cells[0])
                or 'code-summary: "Exported source"' in source(cells[0])
                and not any('"Exported source"' in source(c) for c in block)
            ):
                block.append(cells.pop(0))
        entries, sources = [c for c in block if is_entry(c)], [c for c in block if not is_entry(c)]
        if entries and sources:
            opts, others, code = options(source(sources[0]))
            entries.sort(key=lambda e: place(e, code))
            if len(code.splitlines()) <= longest:
                for entry in entries:
                    headings_only(entry)
                opts = {k: v for k, v in opts.items() if not k.startswith("code-")}
            else:
                opts |= {"code-fold": True, "code-summary": "Source"}
            sources[0]["source"] = with_options(opts, others, code)
        done += entries + sources
    notebook["cells"] = done


def headings_only(entry):
    "Cut a reference entry behind its heading."
    for output in entry.get("outputs", []):
        lines = "".join(output.get("data", {}).get("text/markdown", "")).split("\n")
        last = next((n for n, line in enumerate(lines) if line.startswith("###")), len(lines))
        if lines != [""]:
            output["data"]["text/markdown"] = "\n".join(lines[: last + 1]) + "\n"


def prepare():
    "From nbdev's processed copy to the folder that smalldocs renders."
    folder = STAGE / "_proc"
    config = yaml.safe_load((STAGE / "nbs" / "nbdev.yml").read_text())
    pages = {
        p.relative_to(folder): json.loads(p.read_text(encoding="utf-8"))
        for p in sorted(folder.rglob("*.ipynb"))
    }
    if not pages:
        fail("nbdev processed no notebook")
    names = page_names(pages)
    machines = contents_for_machines(pages, names, config["website"])
    (STAGE / "llms.txt").write_text(machines, encoding="utf-8")
    for notebook in pages.values():
        arrange_entries(notebook)
    problems = refer(
        pages,
        names,
        number(pages, names),
        config["website"]["site-url"],
        config["website"]["repo-url"],
    )
    for path, notebook in pages.items():
        (folder / path).unlink()
        notebook["cells"][0]["source"] = re.sub(
            r"^output-file:.*\n", "", source(notebook["cells"][0]), flags=re.M
        )
        (folder / names[path]).write_text(json.dumps(notebook), encoding="utf-8")
    code_pages(folder)
    quarto = yaml.safe_load((folder / "_quarto.yml").read_text())
    quarto["format"].pop("commonmark", None)
    for key in ("keep-md", "html-math-method"):
        quarto["format"]["html"].pop(key, None)
    (folder / "_quarto.yml").write_text(yaml.safe_dump(quarto, sort_keys=False))
    sidebar = contents()
    for path, name in names.items():
        sidebar = sidebar.replace(f"- {path}\n", f"- {name}\n")
    (folder / "sidebar.yml").write_text(sidebar)
    return folder, problems


def contents_for_machines(pages, names, website):
    "llms.txt: every page of the book in its order, with its title and what it is about, for programs that read."
    lines = [f"# {website['title']}", "", f"> {website['description']}"]
    part = None
    for now, _, path in book():
        if path not in pages:
            continue
        if now != part:
            part = now
            lines += ["", f"## {part}", ""]
        about = front_matter(pages[path])
        address = f"{website['site-url']}/{names[path].with_suffix('.html').as_posix()}"
        lines.append(
            f"- [{about.get('title', path.stem)}]({address}): {about.get('description', '')}"
        )
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- what pages need beside them

LIBRARIES = {  # what smalldocs asks a content network for: (package, version, the files that pages need)
    "katex": (
        "0.16.11",
        ["katex.min.css", "katex.min.js", "contrib/auto-render.min.js", "fonts/*.woff2"],
    ),
    "mermaid": ("11.4.1", ["mermaid.esm.min.mjs", "chunks/mermaid.esm.min/*"]),
}


def library(name):
    "Unpack one library from its npm package, once; a later build finds it in `_executed/`."
    version, wanted = LIBRARIES[name]
    folder = OUT / "libraries" / f"{name}-{version}"
    if not folder.exists():
        if not shutil.which("npm"):
            fail(
                f"{name} {version} is needed for the pages and comes from npm, which was not found; install "
                f"Node.js, or unpack the package's dist/ into {folder.relative_to(ROOT)}"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"],
            cwd=folder.parent,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            fail(
                f"npm pack {name}@{version} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        archive = folder.parent / f"{name}-{version}.tgz"
        unpacked = folder.with_suffix(".part")
        shutil.unpack_archive(archive, unpacked, filter="data")
        (unpacked / "package" / "dist").rename(folder)
        shutil.rmtree(unpacked)
        archive.unlink()
    return folder, [f for pattern in wanted for f in sorted(folder.glob(pattern))]


def localise(site):
    "Replace every request to another host by a file of the site."
    pages = sorted(site.rglob("*.html"))
    for name in LIBRARIES:
        address = re.compile(rf"https://[\w./-]+/{name}@[\w.]+/dist")
        users = [p for p in pages if address.search(p.read_text(encoding="utf-8"))]
        if not users:
            continue
        folder, files = library(name)
        for file in files:
            target = site / "site_libs" / name / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        for page in users:
            up = "../" * (len(page.relative_to(site).parts) - 1) or "./"
            page.write_text(
                address.sub(f"{up}site_libs/{name}", page.read_text(encoding="utf-8")),
                encoding="utf-8",
            )
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        text = re.sub(r"@import\s+url\([^)]*\)\s*;?|@import\s*\"https:[^\"]*\"\s*;?", "", text)
        if sheet.name == "katex.min.css":
            text = re.sub(r",url\([^)]*\.(?:woff|ttf)\) format\(\"\w+\"\)", "", text)
        sheet.write_text(text, encoding="utf-8")


def local_search(site):
    "Load the search index as a script, which also works on a page that is opened as a file; whole words come first."
    script = site / "site_libs" / "smalldocs.js"
    text = script.read_text(encoding="utf-8")
    fetched = 'const r = await fetch(offset + "search.json");\n      index = await r.json();'
    if fetched not in text:
        fail("smalldocs loads its search index in a new way; mend local_search()")
    loaded = 'index = await new Promise((done, no) => { const s = document.createElement("script"); s.src = offset + "search.js"; s.onload = () => done(window.searchIndex); s.onerror = no; document.head.append(s); });'
    text = text.replace(fetched, loaded)
    order = re.compile(r"const hits = fuse \?.*?\.slice\(0, limit\);", re.S)
    if len(order.findall(text)) != 1:
        fail("smalldocs orders what it finds in a new way; mend local_search()")
    text = order.sub("const hits = ranked(q, limit);", text)
    ours = (ROOT / "tools" / "search.js").read_text(encoding="utf-8")
    text = text.replace("let index = null, fuse = null;", f"let index = null, fuse = null;\n{ours}")
    script.write_text(text, encoding="utf-8")
    (site / "search.js").write_text(
        "window.searchIndex = " + (site / "search.json").read_text(encoding="utf-8") + ";\n",
        encoding="utf-8",
    )


def captions(page):
    "Code and mathematics in captions, which arrive as plain text."

    def rich(match):
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", match[2])
        text = re.sub(r"\$([^$]+)\$", r'<span class="math inline">\\(\1\\)</span>', text)
        return (
            match[1] + re.sub(r"^((?:Figure|Table) \d+):", r"<strong>\1.</strong>", text) + match[3]
        )

    return re.sub(
        r"(<(?:figcaption|caption)>)(.*?)(</(?:figcaption|caption)>)", rich, page, flags=re.S
    )


def comment_links(page):
    "Links that nbdev writes into the comments of arguments, where Markdown is not read."

    def linked(match):
        target = re.sub(r"\.ipynb(?=#|$)", ".html", match[2])
        target = re.sub(r"#(\w+)\.\w+$", r"#\1", target)  # a method stands with its class
        return f'<a href="{target}">{match[1]}</a>'

    def comment(match):
        return re.sub(r"\[`([^`\]]+)`\]\(([^)\s]+)\)", linked, match[0])

    return re.sub(r'<span class="co">[^<]*</span>', comment, page)


def sentence_cells(page, long=30):
    "Mark the cells of tables that hold more than a few words, so that a phone gives them room."

    def marked(match):
        text = re.sub(r"<[^>]+>", "", match[2])
        if len(html.unescape(text).strip()) <= long or " class=" in match[1]:
            return match[0]
        return f'<td class="sentence"{match[1]}>{match[2]}</td>'

    return re.sub(r"<td([^>]*)>((?:(?!<td|</td>).)*)</td>", marked, page, flags=re.S)


def fold_tables(page, longest=12):
    "Tables of data with many rows wait until somebody wants them."

    def folded(match):
        count = len(re.findall(r"<tr\b", match[0])) - 1
        if count <= longest:
            return match[0]
        summary = f"<summary>Table of {count} rows</summary>"
        return f'<details class="long-table">{summary}{match[0]}</details>'

    return re.sub(r'<table[^>]*class="dataframe.*?</table>', folded, page, flags=re.S)


def finish(site):
    "Small corrections of the rendered pages."
    for page in site.rglob("*.html"):
        text = comment_links(captions(page.read_text(encoding="utf-8")))
        text = fold_tables(sentence_cells(text))
        text = re.sub(r"<table>", '<table class="table table-sm">', text)
        text = re.sub(r'(<table[^>]*class="dataframe)"', r'\1 table table-sm"', text)
        page.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- checks


def ids_of(text):
    return set(re.findall(r'\s(?:id|name)="([^"]+)"', text))


def without_code(text):
    "A page's text without scripts, styles, code and mathematics."
    return re.sub(
        r"<(script|style|pre|code)\b.*?</\1>|<span class=\"math.*?</span>", " ", text, flags=re.S
    )


def check_page(page, site, ids, own="about:blank"):
    "What is wrong with one page, one line each; `own` is where the site will be published, so links there are links to its own pages."
    text, name = page.read_text(encoding="utf-8"), page.relative_to(site)
    markup = re.sub(
        r"(<script\b[^>]*>).*?(</script>)|(<style\b[^>]*>).*?(</style>)",
        r"\1\2\3\4",
        text,
        flags=re.S,
    )
    asked = re.findall(
        r'<(?:img|script|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|data)="([^"]+)"',
        markup,
    )
    asked += re.findall(
        r'<link\b(?=[^>]*rel="(?:stylesheet|icon|preload|modulepreload)")[^>]*?\shref="([^"]+)"',
        markup,
    )
    asked += re.findall(
        r"(?:\bfrom|\bimport\(?|importScripts\(|fetch\()\s*['\"]([^'\"]+)['\"]",
        " ".join(re.findall(r"<script\b[^>]*>(.*?)</script>", text, flags=re.S)),
    )
    for address in asked:
        if re.match(r"(https?:)?//", address):
            yield f"{name}: asks another host for {address[:80]}"
    weight = page.stat().st_size
    for address in [*asked, *re.findall(r'<a\b[^>]*?\shref="([^"]+)"', markup)]:
        address = html.unescape(address)
        if address.startswith(own):
            address = posixpath.relpath(
                address.removeprefix(own), posixpath.dirname(name.as_posix()) or "."
            )
        if re.match(r"[a-z][a-z0-9+.-]*:|//", address):
            continue
        path, _, anchor = address.partition("#")
        path = path.split("?")[0]
        target = (page.parent / path).resolve() if path else page
        if target.is_dir():
            target = target / "index.html"
        if not target.exists():
            yield f"{name}: link to {address}, which does not exist"
        elif anchor and target.suffix == ".html" and anchor not in ids(target):
            yield f"{name}: link to {address}, but that page has no such place"
        if address in asked and target.is_file():
            weight += target.stat().st_size
    if weight > 3 << 20:
        yield f"{name}: weighs {weight / (1 << 20):.1f} MB with what it loads; the limit is 3 MB"
    words = without_code(text)
    for left in sorted(
        set(re.findall(r"@(?:fig|tbl|eq|sec)-[\w-]+|\?\?|\{#[\w-]+\}|^:::.*$", words, flags=re.M))
    ):
        yield f"{name}: unresolved {left}"
    for picture in re.findall(r"<img\b[^>]*>", markup):
        if ' alt="' not in picture:
            yield f"{name}: a picture without alt text: {re.sub('base64,.*', 'base64, ...', picture)[:90]}"
    for broken in re.findall(r'<div class="cell-output cell-output-error">', text):
        yield f"{name}: shows an error output"


def check_mathematics(site):
    "Ask KaTeX itself about every formula, where Node.js is installed."
    folder = OUT / "libraries" / f"katex-{LIBRARIES['katex'][0]}"
    if not shutil.which("node") or not folder.exists():
        return []
    found = [
        [str(page.relative_to(site)), html.unescape(tex[2:-2]), tex.startswith("\\[")]
        for page in sorted(site.rglob("*.html"))
        for tex in re.findall(
            r'<span class="math (?:inline|display)">(.*?)</span>',
            page.read_text(encoding="utf-8"),
            flags=re.S,
        )
    ]
    script = """const katex = require(process.argv[1]); const list = JSON.parse(require('fs').readFileSync(0));
for (const [page, tex, displayMode] of list) try { katex.renderToString(tex, {displayMode, strict: 'ignore'}) } catch (e) { console.log(page + ': ' + e.message.replace(/\\n/g, ' ')) }"""
    done = subprocess.run(
        ["node", "-e", script, str(folder / "katex.min.js")],
        input=json.dumps(found),
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"  {len(found)} formulas read by KaTeX")
    return done.stdout.splitlines()


def check(site):
    known = {}

    def ids(page):
        if page not in known:
            known[page] = ids_of(page.read_text(encoding="utf-8"))
        return known[page]

    pages, own = (
        sorted(site.rglob("*.html")),
        yaml.safe_load((ROOT / "nbs" / "nbdev.yml").read_text())["website"]["site-url"] + "/",
    )
    problems = [
        line for page in pages for line in check_page(page, site, ids, own)
    ] + check_mathematics(site)
    for sheet in site.rglob("*.css"):
        for address in re.findall(
            r"url\(['\"]?(?!data:|#)([^)'\"]+)", sheet.read_text(encoding="utf-8")
        ):
            if re.match(r"(https?:)?//", address):
                problems.append(f"{sheet.relative_to(site)}: asks another host for {address}")
            elif not (sheet.parent / address.split("?")[0].split("#")[0]).exists():
                problems.append(f"{sheet.relative_to(site)}: {address} does not exist")
    return pages, sorted(set(problems))


def run(*command, cwd=ROOT):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd)
    if done.returncode:
        sys.exit(done.returncode)


def smalldocs():
    "Render the staged sources in pure Python; return the site and what is dangling in the sources."
    folder, dangling = prepare()
    command = "import sys; from smalldocs.cli import main; sys.exit(main())"
    run("-c", command, "check", cwd=folder)
    run("-c", command, "render", "--quiet", "--strict", cwd=folder)
    site = folder / "_docs"
    localise(site)
    local_search(site)
    finish(site)
    shutil.copy(STAGE / "llms.txt", site)
    return site, dangling


def quarto():
    "Render the staged sources with the Quarto program, as `nbdev_docs` does."
    if not shutil.which("quarto"):
        fail(
            "--quarto needs the program quarto, which was not found; leave the option away, or install it from "
            "quarto.org"
        )
    folder = STAGE / "_proc"
    subprocess.run(["quarto", "render", "--no-cache"], cwd=folder, check=True)
    site = folder / "_docs"
    localise(site)
    return site, []


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--no-run", action="store_true", help="take the executed copies as they are"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the staged sources in _executed/book"
    )
    parser.add_argument(
        "--quarto", action="store_true", help="render with the Quarto program instead of smalldocs"
    )
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        return process()
    if not args.no_run:
        run(ROOT / "tools" / "run_notebooks.py")
    stage()
    run(ROOT / "tools" / "build_site.py", "--process")
    site, dangling = quarto() if args.quarto else smalldocs()
    pages, problems = check(site)
    problems = dangling + problems
    if args.quarto:  # its pages may ask a content network for what its own parts need; the offline book is the other one
        notes = [p for p in problems if re.search(r"asks another host|weighs", p)]
        for note in notes:
            print(f"  note: {note}")
        problems = [p for p in problems if p not in notes]
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(site, SITE)
    if not args.keep:
        shutil.rmtree(STAGE)
    if problems:
        fail(f"{len(problems)} things to mend on {len(pages)} pages")
    print(f"{len(pages)} pages in _docs/; open _docs/index.html")


if __name__ == "__main__":
    main()
