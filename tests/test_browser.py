"""The walk through the site, on a page with one fault of every kind. `make docs` walks the real pages (tools/check_site.py)."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import check_site  # noqa: E402

FAULTY = """<!doctype html><html><head><title>p</title><style>a.plain:focus { outline: none } .sr { display: none }</style></head><body><main>
<img src="gone.png" alt="a cube"><img src="dot.svg"><img src="https://elsewhere.invalid/x.png" alt="x">
<a class="plain" href="ok.html">fine</a><a href="ok.html#nowhere">anchor</a><a href="none.html">file</a><a href="ok.html#here"></a>
<p>$$ x $$</p><span class="math inline">\\(y\\)</span><p>see @fig-none</p><canvas></canvas>
<div style="width: 900px">wide</div><i id="twice"></i><i id="twice"></i>
<script>console.error("said"); undefinedName()</script></main></body></html>"""
FOUND = ("404 for gone.png", "picture does not load", "picture without alt text", "asks another host for https://elsewhere.invalid", "ok.html#nowhere, but that page has no such place",
         "none.html, which does not exist", "raw markup left: $$ x $$", "mathematics not rendered", "raw markup left: see @fig-none", "drawing without a label", "wider than 400 px: 9",
         "the id twice is used twice", "console error: said", "undefinedName", "keyboard focus does not show on A.plain", "no name for a screen reader")


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><rect width="4" height="4"/></svg>')
    (folder / "ok.html").write_text('<!doctype html><html><head><title>ok</title><link rel="icon" href="dot.svg"></head><body><main><h2 id="here">A</h2><a href="faulty.html">there</a></main></body></html>')
    (folder / "faulty.html").write_text(FAULTY)
    problems, more = check_site.walk(folder)
    if problems is None: pytest.skip(f"no page walked: {more}")
    return problems


@pytest.mark.parametrize("fault", FOUND)
def test_the_walk_names_every_kind_of_fault(walked, fault):
    assert sum(fault in line and line.startswith("faulty.html") for line in walked) >= 1, walked


def test_a_page_without_faults_is_passed(walked):
    assert not [line for line in walked if line.startswith("ok.html")]
