"""The walk through the site, on pages with one fault of every kind.

`make docs` walks the real pages (tools/check_site.py).
Without a browser these tests are skipped, but not in the gate (.ci/run), which sets UNIPRE3D_NEED_BROWSER=1.
"""

import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import check_site  # noqa: E402

FAULTY = """<!doctype html><html><head><title>p</title><style>a.plain:focus { outline: none } .sr { display: none } .quarto-dark .night { color: #111; background: #222 }</style></head><body><main>
<img src="gone.png" alt="a cube"><img src="dot.svg"><img src="https://elsewhere.invalid/x.png" alt="x">
<a class="plain" href="ok.html">fine</a><a href="ok.html#nowhere">anchor</a><a href="none.html">file</a><a href="ok.html#here"></a>
<p>$$ x $$</p><span class="math inline">\\(y\\)</span><p>see @fig-none</p><canvas></canvas>
<div style="width: 900px">wide</div><p style="color: #999; background: #fff">faint</p><p class="night">unread</p><i id="twice"></i><i id="twice"></i>
<button onclick="smalldocsToggleScheme()">theme</button><img src="heavy.bin" alt="heavy">
<script>window.smalldocsToggleScheme = () => document.documentElement.classList.toggle("quarto-dark"); console.error("said"); undefinedName()</script></main></body></html>"""
FOUND = (
    "404 for gone.png",
    "picture does not load",
    "picture without alt text",
    "asks another host for https://elsewhere.invalid",
    "ok.html#nowhere, but that page has no such place",
    "none.html, which does not exist",
    "raw markup left: $$ x $$",
    "mathematics not rendered",
    "raw markup left: see @fig-none",
    "drawing without a label",
    "wider than 400 px: 9",
    "the id twice is used twice",
    "console error: said",
    "undefinedName",
    "keyboard focus does not show on A.plain",
    "no name for a screen reader",
    "weighs 3.",
    'contrast of 2.8:1 for "faint" in p., light theme',
    'for "unread" in p.night, dark theme',
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "dot.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><rect width="4" height="4"/></svg>'
    )
    (folder / "ok.html").write_text(
        '<!doctype html><html><head><title>ok</title><link rel="icon" href="dot.svg"></head><body><main><h2 id="here">A</h2><a href="faulty.html">there</a></main></body></html>'
    )
    (folder / "faulty.html").write_text(FAULTY)
    (folder / "heavy.bin").write_bytes(bytes(3 << 20))
    return folder


@pytest.fixture(scope="module")
def walked(faulty):
    problems, more = check_site.walk(faulty)
    if problems is None:
        pytest.skip(f"no page walked: {more}")
    return problems


@pytest.mark.parametrize("fault", FOUND)
def test_the_walk_names_every_kind_of_fault(walked, fault):
    assert sum(fault in line and line.startswith("faulty.html") for line in walked) >= 1, walked


def test_one_window_finds_what_two_find(walked, faulty):
    weights = {}
    assert check_site.walk(faulty, weights=weights, windows=1) == (walked, 2)
    assert weights["faulty.html"] > check_site.HEAVY > weights["ok.html"] > 0


def test_no_other_host_is_reached(tmp_path, faulty):
    "Not even another name of this machine, on which something answers."
    with check_site.served(faulty) as base:
        elsewhere = base.replace(check_site.HERE, "localhost") + "dot.svg"
        page = f'<!doctype html><title>p</title><link rel="icon" href="data:,"><img src="{elsewhere}" alt="a dot">'
        (tmp_path / "asks.html").write_text(page)
        problems, more = check_site.walk(tmp_path, ["asks.html"])
    if problems is None:
        pytest.skip(f"no page walked: {more}")
    assert f"asks.html: asks another host for {elsewhere}" in problems
    assert any("picture does not load" in line for line in problems), problems


def test_a_page_without_faults_is_passed(walked):
    assert not [line for line in walked if line.startswith("ok.html")]


RESULTS = """<!doctype html><html><head><title>r</title><link rel="icon" href="data:,"><style>body, figure {{ margin: 0 }} svg {{ display: block }}</style></head>
<body><main><div style="height: {above}px"></div>{picture}<div style="height: {below}px"></div></main></body></html>"""
DRAWN = '<svg width="{0}" height="100" aria-label="d"><rect width="9" height="9"/></svg>'


def test_a_page_of_results_is_short_and_begins_with_a_picture(tmp_path):
    screen = check_site.DESK["height"]
    figure = "<figure>" + DRAWN.format(300) + "</figure>"
    pages = {
        "results_good.html": (screen, figure, 13 * screen - 200),
        "results_long.html": (screen, figure, 15 * screen),
        "results_late.html": (3 * screen, DRAWN.format(20) + figure, 0),
        "results_bare.html": (screen, DRAWN.format(300), 0),  # not a figure
        "other.html": (16 * screen, "", 0),
    }
    for name, (above, picture, below) in pages.items():
        text = RESULTS.format(above=above, picture=picture, below=below)
        (tmp_path / name).write_text(text)
    problems, more = check_site.walk(tmp_path, windows=1)
    if problems is None:
        pytest.skip(f"no page walked: {more}")
    assert problems == [
        "results_bare.html: no picture on a page of results",
        "results_late.html: the first picture begins 3.1 screens down; the limit is 2",
        "results_long.html: 16.1 screens long; the limit is 15",
    ]


VIEWER = "<!doctype html><html><head><title>v</title><link rel='icon' href='data:,'></head><body><main>{}</main></body></html>"


def test_a_viewer_has_drawn_and_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(check_site, "PATIENCE", 2_000)
    stopped = "<div class='viewer' data-drawn='1' onclick='console.error(1)'>v</div>"
    pages = {
        "blank.html": "<div class='viewer'>v</div>",
        "folded.html": "<div class='viewer' style='display: none'>v</div>",
        "stopped.html": stopped,
    }
    for name, viewer in pages.items():
        (tmp_path / name).write_text(VIEWER.format(viewer))
    problems, more = check_site.walk(tmp_path, windows=1)
    if problems is None:
        pytest.skip(f"no page walked: {more}")
    assert problems == ["blank.html: a viewer draws nothing", "stopped.html: console error: 1"]


SEARCH = """<!doctype html><html><head><title>i</title><link rel="icon" href="data:,"><style>.quarto-dark input { background: #222 }</style><script>
const index = %s, box = () => document.querySelector('input');
window.smalldocsToggleScheme = () => { %s };
document.addEventListener('keydown', e => { if (e.key === 'k' && e.ctrlKey) { e.preventDefault(); %s } });
function show() { document.querySelector('.smalldocs-search-results').innerHTML = index.map(h => '<a class="search-result" href="' + h + '">x</a>').join(''); }
</script></head><body><main><div class="smalldocs-search"><input aria-label="search" oninput="show()" onkeydown="%s"><div class="smalldocs-search-results show"></div></div>
<button onclick="smalldocsToggleScheme()">theme</button></main></body></html>"""
ENTRY = "if (event.key === 'Enter') document.querySelector('a.search-result').click()"


@pytest.fixture(autouse=True)
def words_of_two_pages(monkeypatch):
    "What a newcomer types on a site of two pages."
    monkeypatch.setattr(check_site, "FIRST", {"install": ("core.html",)})


def whole_site(tmp_path, *parts):
    "What the walk says of search, keyboard and theme on a site of two pages."
    (tmp_path / "index.html").write_text(SEARCH % parts)
    (tmp_path / "core.html").write_text(
        "<!doctype html><html><head><title>c</title><link rel='icon' href='data:,'></head><body><main>core</main></body></html>"
    )
    (tmp_path / "search.json").write_text("[]")
    problems, more = check_site.walk(tmp_path, [])
    if problems is None:
        pytest.skip(f"no page walked: {more}")
    return problems


def test_search_keyboard_and_theme_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(check_site, "PATIENCE", 3_000)  # what never comes is waited for
    found = "\n".join(whole_site(tmp_path, "['wrong.html']", "", "", ""))
    for fault in (
        "brings wrong.html, not core.html",
        "install brings wrong.html first, not core.html",
        "Ctrl-K does not lead",
        "the toggle changes nothing",
    ):
        assert fault in found, found
    found = "\n".join(
        whole_site(
            tmp_path,
            "['core.html#x', 'core.html']",
            "document.body.style.background = '#111'; document.body.classList.add('quarto-dark')",
            "box().focus()",
            "",
        )
    )
    for fault in ("Enter on a result leads nowhere", "the choice is forgotten"):
        assert fault in found, found


def test_search_keyboard_and_theme_are_passed(tmp_path):
    remember = "localStorage.night = 1; document.body.classList.add('quarto-dark'); document.body.style.background = '#111'"
    assert (
        whole_site(
            tmp_path,
            "['core.html']; addEventListener('DOMContentLoaded', () => localStorage.night && smalldocsToggleScheme())",
            remember,
            "box().focus()",
            ENTRY,
        )
        == []
    )


@contextmanager
def no_browser():
    yield None, "there is none"


@pytest.fixture
def without(monkeypatch, tmp_path):
    "A built site on a machine without a browser; no variable says what to do about that."
    (tmp_path / "index.html").write_text("<p>x")
    monkeypatch.setattr(check_site, "started", no_browser)
    monkeypatch.setattr(sys, "argv", ["check_site.py", str(tmp_path)])
    monkeypatch.delenv("UNIPRE3D_NEED_BROWSER", raising=False)
    monkeypatch.delenv("UNIPRE3D_NO_BROWSER", raising=False)


def test_without_a_browser_the_walk_is_left_out_in_one_line(without, capsys):
    check_site.main()
    assert capsys.readouterr() == ("check_site: the pages were not walked: there is none\n", "")


def test_where_a_browser_is_needed_its_absence_is_a_failure(without, monkeypatch):
    monkeypatch.setenv("UNIPRE3D_NEED_BROWSER", "1")
    with pytest.raises(
        SystemExit, match="UNIPRE3D_NEED_BROWSER=1 asks for a browser, but there is none"
    ):
        check_site.main()
    with pytest.raises(check_site.NoBrowser), check_site.browser():
        pass
    monkeypatch.setattr(sys, "argv", ["check_site.py", "--browser"])
    with pytest.raises(SystemExit, match="check_site: there is none"):
        check_site.main()


def test_a_browser_can_be_declined(monkeypatch):
    monkeypatch.setenv("UNIPRE3D_NO_BROWSER", "1")
    monkeypatch.delenv("UNIPRE3D_NEED_BROWSER", raising=False)
    with check_site.browser() as (found, why):
        assert found is None
        assert "UNIPRE3D_NO_BROWSER=1" in why


def test_a_browser_that_leaves_early_is_no_trouble(tmp_path, capfd):
    (tmp_path / "large.bin").write_bytes(bytes(32 << 20))
    before = threading.active_count()
    with check_site.served(tmp_path) as base:
        with socket.create_connection(
            ("127.0.0.1", int(base.rstrip("/").rsplit(":", 1)[1]))
        ) as visitor:
            visitor.sendall(b"GET /large.bin HTTP/1.0\r\n\r\n")
            assert visitor.recv(100).startswith(b"HTTP/1.0 200")
            # Closing now cuts the line instead of ending the talk.
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until = time.monotonic() + 30
        while threading.active_count() > before + 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert threading.active_count() <= before + 1
    assert capfd.readouterr().err == ""


def test_other_errors_of_the_server_are_told(capfd):
    server = check_site.Server(("127.0.0.1", 0), check_site.Quiet)
    try:
        raise ValueError("something else")
    except ValueError:
        server.handle_error(None, ("127.0.0.1", 1))
    finally:
        server.server_close()
    assert "something else" in capfd.readouterr().err


def test_pages_near_their_limit_are_named():
    limit = check_site.HEAVY
    weights = {
        "light.html": limit // 2,
        "near.html": int(0.9 * limit),
        "full.html": limit,
        "over.html": limit + 1,
    }
    assert list(check_site.near_limit(weights)) == [
        "full.html weighs 3.00 MB, 100% of the limit",
        "near.html weighs 2.70 MB, 90% of the limit",
    ]
