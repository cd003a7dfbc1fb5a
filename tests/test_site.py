"""The site builder's parts, on pages small enough to read."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build_site as site  # noqa: E402
import readme  # noqa: E402


def code(text, *outputs):
    return {"cell_type": "code", "source": text, "outputs": list(outputs)}


def page(*cells, title="T"):
    front = {
        "cell_type": "raw",
        "source": f"---\ntitle: {title}\noutput-file: {title.lower()}.html\n---\n",
    }
    return {"cells": [front, *cells]}


def words(text):
    return {"cell_type": "markdown", "source": text}


def test_options_split_a_cell_into_options_directives_and_code():
    text = "#| export\n#| label: fig-a\n#| fig-cap: >\n#|   two\n#|   lines\nx = 1"
    opts, others, rest = site.options(text)
    assert (others, rest) == (["export"], "x = 1") and opts == {
        "label": "fig-a",
        "fig-cap": "two lines",
    }
    assert site.options(site.with_options(opts, others, rest)) == (opts, others, rest)


def test_figures_and_equations_are_numbered_and_referred_to_across_pages():
    drawing = code("#| label: fig-b\n#| fig-cap: A cube\ndraw()")
    first, second = Path("10_a.ipynb"), Path("g/20_b.ipynb")
    pages = {
        first: page(
            code("#| label: fig-a\nf()"),
            drawing,
            words("$$ x $$ {#eq-x}\n\nsee @fig-b, @eq-x and `@fig-a`"),
            title="A",
        ),
        second: page(words("see @fig-b, [there](../10_a.ipynb#part) and @fig-none"), title="B"),
    }
    names = site.page_names(pages)
    labels = site.number(pages, names)
    problems = site.refer(pages, names, labels, "https://h/base", "https://h/git")
    assert labels["fig-b"][2] == "Figure 2" and '"Figure 2: A cube"' in drawing["source"]
    assert pages[first]["cells"][3]["source"].endswith(
        "see [Figure 2](#fig-b), [Equation 1](#eq-x) and `@fig-a`"
    )
    assert r"x \tag{1}" in pages[first]["cells"][3]["source"]
    assert (
        pages[second]["cells"][1]["source"]
        == "see [Figure 2 of A](../a.ipynb#fig-b), [there](../a.ipynb#part) and fig-none"
    )
    assert problems == ["nbs/g/20_b.ipynb: @fig-none refers to nothing; no cell has that label"]


def test_an_interactive_figure_keeps_its_caption_and_its_name():
    cell = code(
        "#| label: fig-v\n#| fig-cap: Turn <it>\n#| fig-alt: A\nHTML(x)",
        {"data": {"text/html": ["<canvas>", "</canvas>"]}},
    )
    picture = code(
        "#| label: fig-p\n#| fig-cap: P\ndraw()", {"data": {"image/png": "aGk=", "text/html": "x"}}
    )
    site.number({Path("10_a.ipynb"): page(cell, picture)}, {Path("10_a.ipynb"): Path("a.ipynb")})
    assert (
        cell["outputs"][0]["data"]["text/html"]
        == '<figure class="figure" id="fig-v"><canvas></canvas><figcaption>Figure 1: Turn &lt;it&gt;</figcaption></figure>'
    )
    assert (
        "label" not in cell["source"]
        and "fig-cap" not in cell["source"]
        and picture["outputs"][0]["data"]["text/html"] == "x"
    )


def test_links_to_the_published_site_become_local():
    pages = {
        Path("g/20_b.ipynb"): page(
            words(
                "[`f`](https://h/base/core.html#f) [s](https://h/git/blob/main/unipre3d/core.py#L7)"
            ),
            title="B",
        )
    }
    site.refer(pages, site.page_names(pages), {}, "https://h/base", "https://h/git")
    assert (
        pages[Path("g/20_b.ipynb")]["cells"][1]["source"]
        == "[`f`](../core.ipynb#f) [s](../source/unipre3d/core.qmd#line-7)"
    )


def test_a_short_source_is_shown_and_a_long_one_folded():
    def entry(name):
        return code(
            f"show_doc({name})",
            {"data": {"text/markdown": f"---\n\n[source](x)\n\n### {name}\n\nsignature\n"}},
        )

    def exported(lines):
        return code(
            '#| code-fold: show\n#| code-summary: "Exported source"\ndef g(): 1\ndef f(): 2\n'
            + "x = 1\n" * lines
        )

    short, long = (
        page(entry("f"), exported(3), entry("g"), code("f()")),
        page(entry("f"), exported(60)),
    )
    site.arrange_entries(short)
    site.arrange_entries(long)
    assert [c["source"].split("\n")[0] for c in short["cells"][1:]] == [
        "show_doc(g)",
        "show_doc(f)",
        "def g(): 1",
        "f()",
    ]
    assert short["cells"][2]["outputs"][0]["data"]["text/markdown"].endswith("### f\n")
    assert (
        '#| code-fold: true\n#| code-summary: "Source"' in long["cells"][2]["source"]
        and "signature" in long["cells"][1]["outputs"][0]["data"]["text/markdown"]
    )


def test_the_checker_names_every_kind_of_fault(tmp_path):
    (tmp_path / "ok.html").write_text('<h2 id="here">x</h2>')
    (tmp_path / "p.html").write_text(
        '<a href="ok.html#here"></a><a href="ok.html#gone"></a><a href="none.html"></a><p>see @fig-x</p>'
        '<script src="https://h/x.js"></script><img src="ok.html"><a href="https://elsewhere/">fine</a>'
    )
    found = list(
        site.check_page(tmp_path / "p.html", tmp_path, lambda p: site.ids_of(p.read_text()))
    )
    assert len(found) == 5
    for part in (
        "asks another host for https://h/x.js",
        "ok.html#gone, but that page has no such place",
        "none.html, which does not exist",
        "unresolved @fig-x",
        "without alt text",
    ):
        assert any(part in line for line in found), part


def test_readme_shows_what_the_page_shows(monkeypatch, tmp_path):
    (tmp_path / "nbs").mkdir()
    stream = {"output_type": "stream", "name": "stdout", "text": ["3\n"]}
    drawing = {"output_type": "display_data", "data": {"image/png": "aGk="}}
    cells = [
        words("# T\n\n> d"),
        words("[a](geometry/10_a.ipynb#x) [b](https://h/) @fig-x ![c](images/c.png)"),
        code("#| hide\nsecret()"),
        code("print(3)", stream),
        code("#| label: fig-x\n#| fig-cap: C\n#| fig-alt: A\n#| echo: false\ndraw()", drawing),
    ]
    (tmp_path / "nbs" / "index.ipynb").write_text(__import__("json").dumps({"cells": cells}))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text, pictures = readme.readme()
    assert (
        "[a](nbs/geometry/10_a.ipynb#x) [b](https://h/) the figure ![c](nbs/images/c.png)" in text
    )
    assert (
        "```python\nprint(3)\n```\n\n```\n3\n```" in text
        and "secret" not in text
        and "draw" not in text
    )
    assert "![A](nbs/images/readme-1.png)\n\n*C*" in text and pictures == {
        "nbs/images/readme-1.png": b"hi"
    }
    assert len(list(readme.differences())) == 2
    readme.write()
    assert list(readme.differences()) == []


def test_quarto_pages_are_made_local_and_checked(tmp_path, monkeypatch):
    "Where the Quarto program is not installed, a stand-in that writes two pages shows what happens around it."
    program, libraries = (
        tmp_path / "bin" / "quarto",
        tmp_path / "executed" / "libraries" / f"katex-{site.LIBRARIES['katex'][0]}",
    )
    program.parent.mkdir()
    program.write_text("""#!/bin/sh
test "$1 $2" = "render --no-cache" || exit 3
mkdir -p _docs
echo '@import"https://fonts.example/css2?family=A;B";p{color:red}' > _docs/a.css
echo '<html><head><link rel="stylesheet" href="https://cdn.example/npm/katex@0.15.1/dist/katex.min.css"></head><a href="https://unipre3d.github.io/UniPre3D/b.html#x">b</a><a href="c.html">c</a></html>' > _docs/index.html
echo '<p id="y">' > _docs/b.html
""")
    program.chmod(0o755)
    (libraries / "contrib").mkdir(parents=True)
    for name in ("katex.min.css", "katex.min.js", "contrib/auto-render.min.js"):
        (libraries / name).write_text("")
    (tmp_path / "stage" / "_proc").mkdir(parents=True)
    monkeypatch.setattr(site, "OUT", tmp_path / "executed")
    monkeypatch.setattr(site, "STAGE", tmp_path / "stage")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    folder, dangling = site.quarto()
    assert (
        (folder / "site_libs" / "katex" / "katex.min.css").exists()
        and (folder / "a.css").read_text() == "p{color:red}\n"
        and dangling == []
    )
    assert site.check(folder)[1] == [
        "index.html: link to b.html#x, but that page has no such place",
        "index.html: link to c.html, which does not exist",
    ]


def test_links_in_comments_of_arguments_become_links():
    page = '<span class="co"># as [`pool`](tasks/heads.ipynb#pool) gives them</span> <code>[`a`](b.html)</code>'
    found = site.comment_links(page)
    assert '<a href="tasks/heads.html#pool">pool</a>' in found and "[`a`](b.html)" in found


def test_long_cells_of_tables_are_marked():
    page = f"<tr><td>12.3</td><td>{'word ' * 9}</td></tr>"
    assert site.sentence_cells(page).count('class="sentence"') == 1


def test_llms_txt_lists_every_page_in_the_order_of_the_book():
    website = {"title": "Book", "description": "About.", "site-url": "https://book.example"}
    pages = {Path("00_core.ipynb"): page(title="Core"), Path("index.ipynb"): page(title="Home")}
    names = {path: path.with_name(path.stem[-4:] + ".ipynb") for path in pages}
    text = site.contents_for_machines(pages, names, website)
    assert text.startswith("# Book\n\n> About.\n\n## Core\n")
    assert text.index("[Home]") < text.index("[Core](https://book.example/core.html)")
