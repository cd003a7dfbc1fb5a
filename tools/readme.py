"""README.md from `nbs/index.ipynb`, without the Quarto program.

python tools/readme.py            write README.md and the pictures it shows (nbs/images/)
python tools/readme.py --check    exit 1, naming the first difference, when they are out of date
"""

import argparse
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

from build_site import ROOT, options, outside_code, source

DIAGRAM = {
    "nbs/images/idea.png": ("idea.ipynb", "fig-idea-diagram")
}  # pictures of other pages that the landing page shows
NOTE = "<!-- Written by tools/readme.py from nbs/index.ipynb; edit the notebook. -->\n"
HIDDEN = re.compile(r"(hide|export|exporti|default_exp)(\s|$)")


def links(text):
    "Links and pictures of the notebook's folder, seen from the top of the repository; `@fig-x` becomes plain words."

    def local(match):
        path = posixpath.normpath(posixpath.join("nbs", match[2]))
        return f"{match[1]}{path}{match[3]}"

    text = re.sub(r'!\[([^\]]*)\](\([^)\s]+\))\{fig-alt="([^"]*)"\}', r"![\3]\2\n\n*\1*", text)
    text = re.sub(r"(\]\()(?!\w+:|#)([^)#\s]+)(#?[^)\s]*\))", local, text)
    text = re.sub(r'(<img\b[^>]*\ssrc=")(?!\w+:)([^"]+)(")', local, text)
    text = re.sub(r"^:::+.*\n?", "", text, flags=re.M)
    text = re.sub(r"\s*\{#[\w-]+\}", "", text)
    return outside_code(text, lambda t: re.sub(r"(?<![\w@])@fig-[\w-]+", "the figure", t))


def fenced(text, language=""):
    return f"```{language}\n{text.strip(chr(10))}\n```"


def picture(data, alt, caption, pictures):
    "Name a picture of the notebook and show it, with its caption below."
    name = f"nbs/images/readme-{len(pictures) + 1}.png"
    pictures[name] = base64.b64decode("".join(data))
    return f"![{alt}]({name})" + (f"\n\n*{caption}*" if caption else "")


def output_text(output, opts, pictures):
    "One output as Markdown, or nothing."
    if output["output_type"] == "stream":
        return fenced("".join(output["text"])) if output.get("name") == "stdout" else ""
    data = output.get("data", {})
    for kind, show in (
        ("text/markdown", lambda v: links("".join(v))),
        (
            "image/png",
            lambda v: picture(v, opts.get("fig-alt", ""), opts.get("fig-cap", ""), pictures),
        ),
        ("text/html", "".join),
        ("text/plain", lambda v: fenced("".join(v))),
    ):
        if kind in data:
            return show(data[kind])
    return ""


def cell_text(cell, pictures):
    "One cell as Markdown, or nothing."
    if cell["cell_type"] == "markdown":
        return links(source(cell))
    if cell["cell_type"] != "code":
        return ""
    opts, others, code = options(source(cell))
    if (
        any(HIDDEN.match(o) for o in others)
        or "nbdev_export(" in code
        or opts.get("include") is False
        or opts.get("readme") is False
    ):
        return ""
    shown = (
        []
        if opts.get("echo") is False or opts.get("code-fold") or not code.strip()
        else [fenced(code, "python")]
    )
    if opts.get("output") is not False:
        shown += [output_text(o, opts, pictures) for o in cell["outputs"]]
    return "\n\n".join(part for part in shown if part)


def figure(page, label):
    "The picture of a figure of another page."
    for cell in json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and options(source(cell))[0].get("label") == label:
            return base64.b64decode(
                "".join(
                    next(
                        o["data"]["image/png"]
                        for o in cell["outputs"]
                        if "image/png" in o.get("data", {})
                    )
                )
            )
    sys.exit(f"readme: nbs/{page} has no figure {label}")


def readme():
    "The text of README.md, and the pictures that it shows, by path."
    notebook, pictures = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")), {}
    parts = [cell_text(cell, pictures) for cell in notebook["cells"]]
    pictures |= {
        path: figure(*where)
        for path, where in DIAGRAM.items()
        if any(path in part for part in parts)
    }
    return "\n\n".join([NOTE, *(p.strip() for p in parts if p.strip())]).replace(
        NOTE + "\n\n", NOTE + "\n"
    ) + "\n", pictures


def differences():
    "What is out of date, one line each."
    text, pictures = readme()
    path = ROOT / "README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        yield "README.md differs from nbs/index.ipynb; run `python tools/readme.py`"
    for name, content in pictures.items():
        if not (ROOT / name).exists() or (ROOT / name).read_bytes() != content:
            yield f"{name} differs from the picture in nbs/index.ipynb; run `python tools/readme.py`"
    for extra in sorted((ROOT / "nbs" / "images").glob("readme-*.png")):
        if str(extra.relative_to(ROOT)) not in pictures:
            yield f"{extra.relative_to(ROOT)} is not shown by nbs/index.ipynb any more; run `python tools/readme.py`"


def write():
    text, pictures = readme()
    (ROOT / "nbs" / "images").mkdir(exist_ok=True)
    for old in (ROOT / "nbs" / "images").glob("readme-*.png"):
        old.unlink()
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    for name, content in pictures.items():
        (ROOT / name).write_bytes(content)
    print(f"README.md: {len(text.splitlines())} lines, {len(pictures)} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when something is out of date"
    )
    args = parser.parse_args()
    if not (ROOT / "nbs" / "index.ipynb").exists():
        sys.exit("readme: nbs/index.ipynb, the landing page, does not exist")
    if not args.check:
        write()
    else:
        found = list(differences())
        print("\n".join(found) or "README.md agrees with nbs/index.ipynb")
        sys.exit(bool(found))
