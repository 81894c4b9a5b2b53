"""The report: one HTML file that opens anywhere, without a server and without a network.

The same modules, style sheet and views as the dashboard's, put into one text. Three rules keep it harmless whatever a
run is called or has logged: data stands in a `<script type="application/json">` in which every `<` and `>` is escaped,
so that no text of it ends the element; the policy in its `<meta>` lets only those scripts and styles work whose hashes
it names; and the pages write texts as texts.

The modules become one script by plain means, for they keep to two forms: `import { a, b as c } from "./x.js";` and
`export` before a declaration. Each becomes a function that is called once and returns what it exports.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import msgspec

from .. import __version__
from ..logs.reading import Wanted
from .run import Run
from .serving import assets
from .views import About

MAIN = "main.js"
IMPORT = re.compile(r'^import \{([^}]*)\} from "(\./|\.\./)([A-Za-z0-9_/.-]+\.js)";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async function|function|const|class) (\w+))", re.MULTILINE)
LEFT = re.compile(r"^\s*(?:import|export)\b", re.MULTILINE)
ESCAPED = {b"<": b"\\u003c", b">": b"\\u003e", b"&": b"\\u0026", "\u2028".encode(): b"\\u2028"}
ESCAPED |= {"\u2029".encode(): b"\\u2029"}
LOG_LINES = 2000
STEPS = 24  # of which the waterfall is in the file


def bundle(files: dict[str, str], main: str = MAIN) -> str:
    """ES modules as one classic script, `main` last. Raises ValueError for what keeps to neither form."""
    made: dict[str, str] = {}

    def add(path: str, above: tuple[str, ...]) -> None:
        if path in made:
            return
        if path in above:
            raise ValueError(f"{path} imports itself, by way of {' and '.join(above)}")
        text = files[path]
        folder = path.rpartition("/")[0]
        names = EXPORT.findall(text)

        def local(found: re.Match[str]) -> str:
            where = f"{folder}/{found[3]}" if folder and found[2] == "./" else found[3]
            add(where, (*above, path))
            wanted = re.sub(r"(\w+) as (\w+)", r"\1: \2", " ".join(found[1].split()).rstrip(","))
            return f"const {{ {wanted} }} = {name_of(where)};"

        body = EXPORT.sub("", IMPORT.sub(local, text))
        if (left := LEFT.search(body)) is not None:
            raise ValueError(f"{path}: {body[left.start() : left.start() + 60].strip()!r} cannot be bundled")
        made[path] = f"const {name_of(path)} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();\n"

    add(main, ())
    return '"use strict";\n(() => {\n' + "".join(made.values()) + "})();\n"


def name_of(path: str) -> str:
    return "m_" + re.sub(r"\W", "_", path)


def as_data(view: Any) -> bytes:
    """JSON that may stand between <script> and </script>, whatever is in it."""
    data = msgspec.json.encode(view)
    for sign, instead in ESCAPED.items():
        data = data.replace(sign, instead)
    return data


def hashed(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


def bake(run: Run) -> bytes:
    """The whole file. Blocks; reads what the pages would ask for."""
    shown = run.waterfall(None)
    clocks = sorted({shown.clock, *shown.slow, *shown.step[:: max(1, len(shown.step) // STEPS)]} - {-1})
    steps = [run.waterfall(clock) for clock in clocks[: 2 * STEPS]]
    views = {
        "overview": run.overview(),
        "series": run.series(),
        "workers": run.workers(),
        "workers_all": run.workers(whole=True),
        "shards": run.shards(),
        "data": run.data(),
        "checkpoints": run.checkpoints(),
        "events": run.events(),
        "config": run.config(),
        "steps": shown,
        "logs": run.logs(Wanted(), LOG_LINES),
    }
    about = About(kind="run", version=__version__, run=run.name, title=run.name, live=False)
    bare = [{field: getattr(each, field) for field in ("clock", "bars", "lacking")} for each in steps]
    return html(as_data({"about": about, "views": views, "waterfalls": bare}))


def html(data: bytes) -> bytes:
    files = assets()
    scripts = [
        files["vendor/uPlot.iife.min.js"].body,
        bundle({path: each.body.decode() for path, each in files.items() if path.endswith(".js")}).encode(),
    ]
    styles = [files["vendor/uPlot.min.css"].body, files["style.css"].body]
    for text in (*scripts, *styles):
        assert b"</script" not in text.lower() and b"</style" not in text.lower()
    icon = base64.b64encode(files["icon.svg"].body).decode()
    policy = (
        f"default-src 'none'; script-src {' '.join(map(hashed, scripts))}; "
        f"style-src {' '.join(map(hashed, styles))}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    licence = b"uPlot 1.6.32, (c) 2022 Leon Sorokin, MIT licence: https://github.com/leeoniya/uPlot"
    return b"".join(
        [
            b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            b'<meta http-equiv="Content-Security-Policy" content="%b">\n' % policy.encode(),
            b'<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            b'<meta name="color-scheme" content="light dark">\n<title>zml</title>\n',
            b'<link rel="icon" href="data:image/svg+xml;base64,%b">\n' % icon.encode(),
            b"<!-- " + licence + b" -->\n",
            *(b"<style>" + text + b"</style>\n" for text in styles),
            b'</head>\n<body>\n<noscript>This report needs JavaScript.</noscript>\n<div id="app"></div>\n',
            b'<script type="application/json" id="baked">' + data + b"</script>\n",
            *(b"<script>" + text + b"</script>\n" for text in scripts),
            b"</body>\n</html>\n",
        ]
    )
