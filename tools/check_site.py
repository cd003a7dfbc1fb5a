"""Walk every page of the built site in a headless browser, without a network, and say what a reader would stumble over.

    python tools/check_site.py [folder]        the folder is _docs/ unless told otherwise

On each page: no failed request, none to another host, no script error, no broken link or anchor, pictures loaded and
described, viewers drawn, mathematics rendered, nothing wider than a phone, at most 3 MB, words that stand out from
what is behind them in the light and in the dark theme, a visible mark on what the keyboard reaches. No code block is
cut and no link is left as Markdown, on a desk and on a phone, and on a phone no table is crushed. A page of results
holds few screens, and a picture near its top. On the whole site: search, also by keyboard alone, what some words find
first, and the theme, also of the search box. The browser is the one Playwright installed, or the system's Chromium.
Without either the walk is left out, which one line says. Two variables of the environment change that: with
UNIPRE3D_NEED_BROWSER=1, which .ci/run sets, a missing browser is a failure, and with UNIPRE3D_NO_BROWSER=1 no browser
is used even where there is one.

    python tools/check_site.py --browser       whether a browser starts; nothing is walked
"""

import json
import os
import queue
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from operator import methodcaller
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEAVY = 3 << 20  # bytes that a page may load
FIRST = {  # what newcomers type, and the pages that may come first
    "install": ("index.html",),
    "features": ("features.html", "index.html"),
    "COLMAP": ("tutorials/photographs.html", "data/imports.html"),
    "GPU": ("render.html", "index.html"),
}
SCREENS, PICTURE = (
    15,
    2,
)  # of a desk: the most that a page of results holds, and where its first picture begins
PHONE, DESK = {"width": 400, "height": 800}, {"width": 1280, "height": 900}
PATIENCE = 60_000  # milliseconds for what takes none: a busy machine is slow, not wrong
HERE = "127.0.0.1"
# The browser knows no other host. Routes of Playwright would stop requests too, but they switch its cache off.
OFFLINE = ["--no-sandbox", f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HERE}"]

READ = """async () => {
  const shown = e => e.getClientRects().length > 0, about = e => (e.outerHTML || '').slice(0, 90);
  const images = [...document.images];
  images.forEach(i => i.loading = 'eager');
  await Promise.all(images.map(i => i.decode().catch(() => {})));
  await document.fonts.ready;
  const text = document.createTreeWalker(document.querySelector('main') || document.body, NodeFilter.SHOW_TEXT), raw = [];
  while (text.nextNode()) {
    const node = text.currentNode;
    if (/\\$\\$|\\\\\\(|\\\\\\[|@(fig|tbl|eq|sec)-\\w/.test(node.data) && !node.parentElement.closest('pre, code, script, style, annotation, textarea')) raw.push(node.data.trim().slice(0, 60));
  }
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  return {
    title: document.title, ids,
    names: [...document.querySelectorAll('a[name]')].map(e => e.name),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    broken: images.filter(i => !i.naturalWidth).map(i => about(i)),
    silent: images.filter(i => !(i.alt || '').trim() && i.getAttribute('role') !== 'presentation').map(i => about(i)),
    bare: [...document.querySelectorAll('main figure svg, main .cell-output-display > svg, main canvas')].filter(e => !e.closest('[aria-hidden=true]') && !e.getAttribute('aria-label') && !e.querySelector('title') && !e.closest('figure[aria-label], [role=img][aria-label]')).map(e => about(e)),
    math: [...document.querySelectorAll('.math')].filter(e => !e.querySelector('.katex, mjx-container, math')).map(e => e.textContent.trim().slice(0, 60)),
    wrong: [...document.querySelectorAll('.katex-error')].map(e => e.textContent.slice(0, 60)), raw,
    unnamed: [...document.querySelectorAll('a[href], button, input')].filter(e => shown(e) && !(e.textContent.trim() || e.getAttribute('aria-label') || e.title || e.labels && e.labels.length || e.querySelector('img[alt]'))).map(e => about(e)),
  };
}"""

WIDE = """() => {
  const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  const clipped = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return true; return false; };
  const over = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1 && !clipped(e));
  const inner = over.filter(e => !over.some(o => o !== e && e.contains(o)));
  return [root.scrollWidth + ' px', ...inner.slice(0, 3).map(e => e.tagName.toLowerCase() + '.' + [...e.classList].join('.') + ' ' + e.textContent.trim().slice(0, 40))];
}"""

# What a reader would have to move sideways to see; folded code is unfolded first.
CLIPPED = """() => {
  document.querySelectorAll('main details').forEach(e => e.open = true);
  return [...document.querySelectorAll('main pre')].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => (e.scrollWidth - e.clientWidth) + ' px of "' + e.textContent.trim().slice(0, 40) + '"');
}"""

# A cell of few letters a line over several lines.
CRUSHED = """() => {
  const lines = e => {
    const range = document.createRange();
    range.selectNodeContents(e);
    return new Set([...range.getClientRects()].filter(r => r.width > 0).map(r => Math.round(r.top / 4))).size;
  };
  const length = e => e.textContent.trim().length;
  const crushed = e => { const n = lines(e); return n > 2 && length(e) / n < 5 || n > 12 && e.clientWidth < 160; };
  return [...document.querySelectorAll('main td, main th')].filter(e => e.getClientRects().length && !e.querySelector('.katex, img, svg, table') && crushed(e))
    .map(e => '"' + e.textContent.trim().slice(0, 40) + '"');
}"""

# The page as it opens, in screens: how long it is, and where its first picture begins.
LENGTH = """() => {
  const screens = pixels => pixels / window.innerHeight;
  const drawn = [...document.querySelectorAll('main img, main canvas, main figure svg')];
  const tops = drawn.map(e => e.getBoundingClientRect()).filter(r => r.width >= 200).map(r => r.top + window.scrollY);
  return {whole: screens(document.documentElement.scrollHeight), picture: tops.length ? screens(Math.min(...tops)) : null};
}"""

MARKDOWN = """() => {
  const found = [], text = document.createTreeWalker(document.querySelector('main') || document.body, NodeFilter.SHOW_TEXT);
  const link = /\\[[^\\]]+\\]\\((https?:|[\\w.\\/-]+\\.(html|ipynb|md))/;
  while (text.nextNode()) {
    const e = text.currentNode.parentElement;
    const code = e.closest('pre, code, script, style, textarea');
    if (link.test(text.currentNode.data) && (!code || e.closest('span.co, span.c1'))) found.push(text.currentNode.data.trim().slice(0, 80));
  }
  return found;
}"""

# Nothing moves while it is looked at.
STILL = "* { transition: none !important; animation: none !important; }"

# A viewer in sight has drawn its picture, and then spins until somebody takes hold of it.
DRAWN = "() => [...document.querySelectorAll('.viewer')].every(e => !e.getClientRects().length || e.dataset.drawn)"
HOLD = (
    "() => document.querySelectorAll('.viewer').forEach(e => e.dispatchEvent(new Event('click')))"
)

# Before the window becomes wide again for the next page: this one is not laid out once more.
HIDE = "() => { document.documentElement.style.display = 'none' }"

FOCUS = """() => {
  const kinds = new Map();
  for (const e of document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')) {
    const place = (e.closest('nav, main, header, footer, #TOC') || document.body);
    const kind = e.tagName + '.' + [...e.classList].sort().join('.') + ' in ' + place.tagName + '#' + place.id;
    if (kinds.has(kind)) continue;
    if (e.getBoundingClientRect().width && getComputedStyle(e).visibility !== 'hidden') kinds.set(kind, e);
  }
  const look = e => { const s = getComputedStyle(e); return [s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) ? s.outline : '', s.boxShadow, s.backgroundColor, s.borderColor].join('|'); };
  const hidden = [];
  for (const [kind, e] of kinds) {
    document.activeElement && document.activeElement.blur();
    const before = look(e);
    e.focus({preventScroll: true});
    if (document.activeElement === e && look(e) === before) hidden.push(kind);
  }
  document.activeElement && document.activeElement.blur();
  return hidden;
}"""


CONTRAST = """() => {
  const parts = text => (text.match(/[\\d.]+/g) || []).map(Number), solid = c => c.length > 3 ? c : [...c.slice(0, 3), 1];
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.backgroundImage !== 'none') return null;                  // a picture: nobody can say
      const c = solid(parts(style.backgroundColor));
      if (c[3] > 0) layers.push(c);
      if (c[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const seen = new Set(), faint = [], words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const e = words.currentNode.parentElement, text = words.currentNode.data.trim();
    if (!text || /^\\W+$/.test(text)) continue;
    const style = getComputedStyle(e), kind = [e.tagName, e.className, e.parentElement.className, style.color].join('|');
    if (seen.has(kind) || e.closest('script, style, noscript, [aria-hidden=true], .visually-hidden, .katex-mathml, svg, canvas, [disabled]')) continue;
    if (style.visibility === 'hidden' || !e.getClientRects().length) continue;
    seen.add(kind);
    const under = behind(e);
    if (!under) continue;
    let opacity = 1;
    for (let p = e; p; p = p.parentElement) opacity *= parseFloat(getComputedStyle(p).opacity);
    const ink = solid(parts(style.color)), [a, b] = [light(over([...ink.slice(0, 3), ink[3] * opacity], under)), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700, ratio = (a + .05) / (b + .05);
    if (ratio < (large ? 3 : 4.5)) faint.push(ratio.toFixed(1) + ':1 for "' + text.slice(0, 30) + '" in ' + e.tagName.toLowerCase() + '.' + e.className);
  }
  return faint;
}"""


# Whether the search box is on the other side of grey than the page.
BOX = """() => {
  const parts = e => getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number);
  const dark = ([r, g, b, a = 1]) => a > .5 && .299 * r + .587 * g + .114 * b < 128;
  const boxes = [...document.querySelectorAll('.smalldocs-search input')].filter(e => e.getClientRects().length);
  const clear = c => c.length > 3 && c[3] < .5;
  return boxes.some(e => clear(parts(e)) || dark(parts(e)) !== dark(parts(document.body)));
}"""


class Quiet(SimpleHTTPRequestHandler):
    "Files without a word about them; what pages share is read and compiled once by each window."

    def log_message(self, *args):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()


class Server(ThreadingHTTPServer):
    "A server that does not mind a browser that leaves in the middle of an answer, as it does for the next page."

    def handle_error(self, request, client_address):
        if isinstance(sys.exc_info()[1], ConnectionError):
            return
        super().handle_error(request, client_address)


@contextmanager
def served(folder):
    "The folder on a port of this machine, for as long as the block lasts."
    server = Server((HERE, 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{HERE}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


class NoBrowser(Exception):
    "There is no browser, and one was asked for."


def asked(name):
    "Whether a variable of the environment is set to 1."
    return os.environ.get(name) == "1"


def program(play):
    "The browser to start: Playwright's own, else the system's, else None."
    own = play.chromium.executable_path
    if Path(own).exists():
        return own
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def started():
    "A headless Chromium, or None and the reason why there is none."
    if asked("UNIPRE3D_NO_BROWSER"):
        yield None, "UNIPRE3D_NO_BROWSER=1 asks for no browser"
        return
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        yield None, "the playwright package is not installed; pip install '.[dev]'"
        return
    with sync_playwright() as play:
        path = program(play)
        if path is None:
            yield None, "no Chromium was found; install one, or run: playwright install chromium"
            return
        # Playwright starts its own without being told where it is, and may choose a smaller build of it.
        own = path == play.chromium.executable_path
        try:
            found = play.chromium.launch(executable_path=None if own else path, args=OFFLINE)
        except Error as error:
            yield None, f"Chromium did not start: {str(error).splitlines()[0]}"
            return
        try:
            yield found, None
        finally:
            found.close()


@contextmanager
def browser():
    "A headless Chromium, or None and the reason why there is none; where one is needed that is an error."
    with started() as (found, why):
        if why and asked("UNIPRE3D_NEED_BROWSER"):
            raise NoBrowser(f"UNIPRE3D_NEED_BROWSER=1 asks for a browser, but {why}")
        yield found, why


class Walk:
    "One browser window that goes from page to page and notes what goes wrong."

    def __init__(self, browser, base):
        self.base = base
        self.problems = []
        self.pages = {}
        self.weights = {}
        self.name = ""
        self.weight = 0
        self.context = browser.new_context(viewport=DESK, color_scheme="light")
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # a busy machine is slow, not wrong
        self.page.on("request", self.requested)
        self.page.on("requestfailed", self.failed)
        self.page.on("response", self.received)
        self.page.on("pageerror", lambda e: self.note(f"script error: {str(e).splitlines()[0]}"))
        self.page.on("console", self.said)

    def short(self, address):
        return address.removeprefix(self.base)

    def note(self, text):
        self.problems.append(f"{self.name}: {text}")

    def requested(self, request):
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.note(f"asks another host for {request.url[:80]}")

    def failed(self, request):
        if request.url.startswith(self.base) and "ERR_ABORTED" not in request.failure:
            self.note(f"request failed: {self.short(request.url)}")

    def received(self, response):
        "Add up what a page loads, and note what is not there."
        self.weight += int(response.headers.get("content-length", 0))
        if response.status >= 400:
            self.note(f"{response.status} for {self.short(response.url)}")

    def said(self, message):
        if message.type == "error":
            self.note(f"console error: {message.text[:120]}")

    def until(self, condition, timeout=None):
        "Wait for what a page has to do; what is done already costs no frame."
        if not self.page.evaluate(condition):
            self.page.wait_for_function(condition, timeout=timeout)

    def toggle(self):
        "Press the theme toggle, if there is one; whether there was one."
        button = self.page.locator("[onclick*=ToggleScheme], .quarto-color-scheme-toggle").first
        if not button.count():
            return False
        dark = "() => !!document.querySelector('.quarto-dark')"
        before = self.page.evaluate(dark)
        button.evaluate("e => e.click()")
        try:
            self.until(f"() => ({dark})() !== {json.dumps(before)}", timeout=PATIENCE)
        except Exception:
            self.note("the theme toggle does not change the theme")
        return True

    def contrast(self):
        "Words that are too faint, in both themes."
        for theme in ("light", "dark"):
            for text in self.page.evaluate(CONTRAST)[:5]:
                self.note(f"contrast of {text}, {theme} theme")
            if not self.toggle():
                break

    def many(self, what, script):
        "Note how often something is wrong on a page, and where first."
        found = self.page.evaluate(script)
        if found:
            self.note(f"{what}, {len(found)} times, first {found[0]}")

    def length(self):
        "A page of results that is too long, or that begins without a picture."
        found = self.page.evaluate(LENGTH)
        if found["whole"] > SCREENS:
            self.note(f"{found['whole']:.1f} screens long; the limit is {SCREENS}")
        if found["picture"] is None:
            self.note("no picture on a page of results")
        elif found["picture"] > PICTURE:
            where = f"{found['picture']:.1f} screens down"
            self.note(f"the first picture begins {where}; the limit is {PICTURE}")

    def hold(self):
        "Note a viewer that draws nothing, and stop those that spin: each frame costs what a page costs."
        try:
            self.until(DRAWN, timeout=PATIENCE)
        except Exception:
            self.note("a viewer draws nothing")
        self.page.evaluate(HOLD)

    def visit(self, name):
        "All that one page can get wrong by itself; what it links to is kept for `links`."
        self.name, self.weight = name, 0
        self.page.set_viewport_size(DESK)
        self.page.goto(self.base + name, wait_until="load")
        self.until("() => !document.querySelector('.mermaid:not([data-processed])')")
        found = self.pages[name] = self.page.evaluate(READ)
        for key, what in dict(
            broken="picture does not load",
            silent="picture without alt text",
            bare="drawing without a label",
            math="mathematics not rendered",
            wrong="KaTeX cannot read",
            raw="raw markup left",
            unnamed="no name for a screen reader",
        ).items():
            for text in dict.fromkeys(found[key]):
                self.note(f"{what}: {text}")
        for label in {i for i in found["ids"] if found["ids"].count(i) > 1}:
            self.note(f"the id {label} is used twice")
        if Path(name).name.startswith("results"):
            self.length()
        self.weights[name] = self.weight  # the search box loads its index when it is focused
        if self.weight > HEAVY:
            self.note(
                f"weighs {self.weight / (1 << 20):.1f} MB with what it loads; the limit is {HEAVY >> 20} MB"
            )
        self.hold()
        self.page.add_style_tag(content=STILL)
        self.page.keyboard.press("Tab")
        for kind in self.page.evaluate(FOCUS):
            self.note(f"keyboard focus does not show on {kind}")
        self.contrast()
        self.many("link left as Markdown", MARKDOWN)
        self.many(f"code cut at {DESK['width']} px", CLIPPED)
        self.page.set_viewport_size(PHONE)
        self.many(f"code cut at {PHONE['width']} px", CLIPPED)
        self.many(f"table crushed at {PHONE['width']} px", CRUSHED)
        wide = self.page.evaluate(WIDE)
        if wide:
            self.note(f"wider than {PHONE['width']} px: {'; '.join(wide)}")
        self.page.evaluate(HIDE)

    def hits(self, name):
        "The addresses of the first five results; none is noted."
        self.name = "search"
        self.page.set_viewport_size(DESK)
        self.page.goto(self.base + "index.html")
        box = self.page.locator(".smalldocs-search input").first
        box.fill(name)
        try:
            self.page.wait_for_selector(
                ".smalldocs-search-results.show a.search-result", timeout=120_000
            )
        except Exception:
            self.note(f"nothing found for {name}")
            return []
        self.page.wait_for_timeout(200)
        return self.page.eval_on_selector_all(
            "a.search-result", "all => all.slice(0, 5).map(a => a.href)"
        )

    def word(self, word, expected):
        "The first result of a word that newcomers type is the page about it."
        hits = self.hits(word)
        if hits and not self.short(hits[0]).startswith(expected):
            wanted = " or ".join(expected)
            self.note(f"{word} brings {self.short(hits[0])} first, not {wanted}")

    def search(self, name, expected):
        "Typing a function's name brings its entry among the first five results, and Enter or a click leads there."
        hits = self.hits(name)
        if not hits:
            return
        if not any(self.short(hit).startswith(expected) for hit in hits):
            return self.note(f"{name} brings {', '.join(map(self.short, hits))}, not {expected}")
        self.page.locator("a.search-result").first.click()
        self.page.wait_for_load_state("load")
        if self.page.url != hits[0]:
            self.note(
                f"a click on the first result for {name} leads to {self.short(self.page.url)}, not "
                f"{self.short(hits[0])}"
            )

    def keyboard(self, name):
        "Without a mouse: Ctrl-K, a name, arrow down, Enter."
        self.name = "keyboard"
        self.page.goto(self.base + "index.html")
        before = self.page.url
        self.page.keyboard.press("Control+k")
        if self.page.evaluate("() => document.activeElement.tagName") != "INPUT":
            return self.note("Ctrl-K does not lead to the search box")
        self.page.keyboard.type(name)
        try:
            self.page.wait_for_selector("a.search-result", timeout=120_000)
        except Exception:
            return self.note(f"nothing found for {name}")
        self.page.wait_for_timeout(200)
        self.page.keyboard.press("ArrowDown")
        self.page.keyboard.press("Enter")
        try:
            self.page.wait_for_url(lambda url: url != before, timeout=PATIENCE)
        except Exception:
            self.note("Enter on a result leads nowhere")

    def theme(self):
        "The toggle changes the colours, and the next page remembers."
        self.name = "theme"
        colour = "() => getComputedStyle(document.body).backgroundColor"
        self.page.goto(self.base + "index.html")
        light = self.page.evaluate(colour)
        if not self.toggle():
            return self.note("there is no toggle")
        dark = self.page.evaluate(colour)
        if dark == light:
            self.note("the toggle changes nothing")
        self.page.reload()
        self.page.wait_for_timeout(300)
        if self.page.evaluate(colour) != dark:
            self.note("the choice is forgotten by the next page")
        self.page.evaluate("() => localStorage.clear()")

    def box(self):
        "The search box is light where the page is light, and dark where it is dark."
        self.name = "search box"
        self.page.goto(self.base + "index.html")
        self.page.add_style_tag(content=STILL)
        for theme in ("light", "dark"):
            if theme == "dark":
                self.toggle()
            if self.page.evaluate(BOX):
                self.note(f"wears the other theme than the page, {theme} theme")
        self.page.evaluate("() => localStorage.clear()")


def functions(site, count=8):
    "Some functions of the package, spread over its modules, with the page that describes each."
    from unipre3d._modidx import d

    entries = [
        (name.split(".")[-1], value[0])
        for module in d["syms"].values()
        for name, value in module.items()
        if "." not in name.split(f"{next(iter(module)).rsplit('.', 1)[0]}.")[-1]
        and not name.split(".")[-1].startswith("_")
    ]
    known = [(name, place) for name, place in entries if (site / place.split("#")[0]).exists()]
    return known[:: max(1, len(known) // count)]


def links(site, base, pages):
    "A line for each link inside the site that leads to no file, or whose anchor is no place there."
    for name, found in pages.items():
        for address in dict.fromkeys(found["links"]):
            if not address.startswith(base):
                continue
            target, anchor = urldefrag(address.removeprefix(base))
            path, anchor = unquote(urlsplit(target).path), unquote(anchor)
            if path.endswith("/") or not path:
                path += "index.html"
            if not (site / path).exists():
                yield f"{name}: link to {path}, which does not exist"
            elif anchor and path in pages:
                places = pages[path]["ids"] + pages[path]["names"]
                if anchor not in places:
                    yield f"{name}: link to {path}#{anchor}, but that page has no such place"


def whole_site(site, trip):
    "What belongs to no page: search, also by keyboard alone, and the theme."
    if not (site / "search.json").exists():
        return
    trip.page.emulate_media(reduced_motion="reduce")  # where viewers do not spin
    found = functions(site)
    for name, place in found:
        trip.search(name, place.split("#")[0])
    for word, expected in FIRST.items():
        if all((site / name).exists() for name in expected):
            trip.word(word, expected)
    trip.keyboard(found[0][0])
    trip.theme()
    trip.box()
    trip.page.emulate_media(reduced_motion="no-preference")


def stroll(base, errands):
    "Open one browser and run errands until none is left; None and the reason if there is none."
    with browser() as (found, why):
        if why:
            return None, why
        trip = Walk(found, base)
        while True:
            try:
                errand = errands.get_nowait()
            except queue.Empty:
                return trip, None
            errand(trip)


def walk(site, names=None, weights=None, windows=2):
    """What is wrong with the site, one line each; None and the reason if no browser can walk it.

    A dictionary given as `weights` receives the bytes that each page loads. Each of `windows` is
    a browser in a thread of its own; they share the pages between them.
    """
    site = Path(site)
    if names is None:
        names = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    errands = queue.SimpleQueue()
    errands.put(partial(whole_site, site))
    for name in names:
        errands.put(methodcaller("visit", name))
    windows = max(1, min(windows, len(names)))
    with served(site) as base, ThreadPoolExecutor(windows) as pool:
        trips = []
        for job in [pool.submit(stroll, base, errands) for _ in range(windows)]:
            trip, why = job.result()
            if why:
                return None, why
            trips.append(trip)
        pages = {name: found for trip in trips for name, found in trip.pages.items()}
        problems = [line for trip in trips for line in trip.problems]
        problems += links(site, base, pages)
    if weights is not None:
        for trip in trips:
            weights.update(trip.weights)
    return sorted(dict.fromkeys(problems)), len(names)


def near_limit(weights):
    "The pages that weigh more than four fifths of what they may, the heaviest first, one line each."
    for name, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
        if 0.8 * HEAVY < weight <= HEAVY:
            yield f"{name} weighs {weight / (1 << 20):.2f} MB, {weight / HEAVY:.0%} of the limit"


def look():
    "Say which browser starts; leave with an error if none does."
    with started() as (found, why):
        if why:
            sys.exit(f"check_site: {why}")
        print(f"Chromium {found.version}")


def main():
    if "--browser" in sys.argv[1:]:
        return look()
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs")
    if not (site / "index.html").exists():
        sys.exit(f"check_site: {site} has no index.html; build the site first: make docs")
    weights = {}
    try:
        problems, more = walk(site, weights=weights)
    except NoBrowser as error:
        sys.exit(f"check_site: {error}")
    if problems is None:
        return print(f"check_site: the pages were not walked: {more}")
    for line in near_limit(weights):
        print(f"  note: {line}")
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    if problems:
        sys.exit(f"check_site: {len(problems)} things to mend on {more} pages")
    print(f"{more} pages walked in Chromium")


if __name__ == "__main__":
    main()
