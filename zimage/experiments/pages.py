"""The files of the viewer's page, and all of them as one: a page that needs no server.

Modules become functions that return what they export, in the order in which they import one another; styles and scripts
stand inline, allowed by their hashes and nothing else. What the page would ask a viewer for stands in it as JSON.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from zimage.settings.fields import Plain

OWN = Path(__file__).with_name("page")
SERVERS = Path(__file__).parents[1] / "serve" / "page"
SHARED = ("base.css", "dom.js", "http.js", "icon.svg", "signin.js", "slider.js", "toast.js")  # of the server's page
STYLES, MAIN = ("base.css", "view.css"), "main.js"
IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([\w.]+)";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?:async )?(?:function|class|const) ([\w$]+)", re.MULTILINE)
LINKED = re.compile(r'<link rel="(?:icon|stylesheet|modulepreload)"[^>]*>\n|<script type="module"[^>]*></script>\n')


def files() -> dict[str, Path]:
    """What the page consists of, by the names under which it asks for it."""
    shared = {name: SERVERS / name for name in SHARED}
    return {**shared, **{path.name: path for path in OWN.iterdir() if path.suffix != ".md"}}


def standalone(held: Mapping[str, Plain]) -> str:
    """The page as one file that holds what it shows: grid, records, pictures and ranks, as `source.js` has them."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in files().items()}
    style = "\n".join(texts[name] for name in STYLES)
    script = bundled(texts)
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    data = json.dumps(held, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n</head>'
    tail = f'<script type="application/json" id="held">{data}</script>\n<script>{script}</script>\n</body>'
    html = LINKED.sub("", texts["index.html"])
    return html.replace("</head>", head).replace("</body>", tail)


def bundled(texts: Mapping[str, str]) -> str:
    """All modules that the main one needs, as one script."""
    parts = [
        f"const {_variable(name)} = (() => {{\n{_function(texts[name])}\n}})();" for name in _in_order(texts, MAIN)
    ]
    return '"use strict";\n' + "\n".join(parts) + "\n"


def _in_order(texts: Mapping[str, str], name: str, seen: set[str] | None = None) -> Iterator[str]:
    """What a module imports, each once, and then itself."""
    seen = set() if seen is None else seen
    if name not in seen:
        seen.add(name)
        for _, inner in IMPORT.findall(texts[name]):
            yield from _in_order(texts, inner, seen)
        yield name


def _function(text: str) -> str:
    body = IMPORT.sub(lambda found: f"const {found[1]} = {_variable(found[2])};", text)
    names = ", ".join(EXPORT.findall(text))
    return f"{re.sub('^export ', '', body, flags=re.MULTILINE)}\nreturn {{ {names} }};"


def _variable(name: str) -> str:
    return f"module_{name.removesuffix('.js')}"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
