"""The report: one file of scripts, styles and data, in which no text of a run can be anything but data."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zml.dashboard.synthetic import HOSTILE, Shape, write
from zml.commands import cli
from zml.dashboard.page import as_data, bake, bundle
from zml.dashboard.run import Run
from zml.dashboard.serving import assets

SMALL = Shape(
    workers=3, shards=2, steps=300, rows=40, member_rows=20, timeline_steps=40, log_lines=20, over=True
)


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(st.none() | st.text() | st.integers(), lambda c: st.lists(c) | st.dictionaries(st.text(), c))
)
def test_data_ends_no_element_and_comes_back_as_it_was(view: object) -> None:
    data = as_data(view)
    assert not re.search(rb"[<>&]|\xe2\x80[\xa8\xa9]", data)
    assert json.loads(data) == view


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_data_holds_no_sign_of_markup(text: str) -> None:
    data = as_data({text: [text]})
    assert b"<" not in data and b">" not in data and "\u2028".encode() not in data
    assert json.loads(data) == {text: [text]}


def test_the_policy_names_exactly_the_scripts_and_styles_that_are_there(tmp_path: Path) -> None:
    write(tmp_path / "run", replace(SMALL, troubles=frozenset({"hostile"})))
    page = bake(Run(tmp_path / "run"))
    policy = re.search(rb'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and b"unsafe" not in policy[1] and policy[1].startswith(b"default-src 'none'")
    for kind in (b"script", b"style"):
        found = re.findall(rb"<%b>(.*?)</%b>" % (kind, kind), page, re.DOTALL)
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'".encode() for text in found
        ]
        named = re.search(rb"%b-src ([^;]*)" % kind, policy[1])
        assert named is not None and named[1].split() == hashes and len(hashes) == 2
    assert page.count(b"<script") == 3 and page.count(b"</script>") == 3
    assert re.findall(rb'(?:src|href)="([^"]{5})', page) == [b"data:"], "nothing of it is fetched"


def test_what_is_baked_is_what_the_pages_would_be_given(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    found = re.search(rb'id="baked">(.*?)</script>', bake(Run(tmp_path / "run")), re.DOTALL)
    assert found is not None
    baked = json.loads(found[1])
    assert baked["about"]["live"] is False and baked["about"]["run"] == "run"
    assert baked["views"]["overview"]["head"]["state"] == "SUCCEEDED"
    assert len(baked["views"]["logs"]["lines"]) == 61 and len(baked["waterfalls"]) >= 24
    assert {
        "series",
        "workers",
        "workers_all",
        "shards",
        "data",
        "checkpoints",
        "events",
        "config",
        "steps",
    } < set(baked["views"])


# -- modules ------------------------------------------------------------------------------------------------------


def test_modules_become_one_script_in_the_order_in_which_they_are_needed() -> None:
    files = {
        "main.js": 'import { b, c as d } from "./p/b.js";\nimport {\n  a,\n} from "./a.js";\nb(a, d);\n',
        "p/b.js": 'import { a } from "../a.js";\nexport function b() {}\nexport const c = a;\n',
        "a.js": "export class a {}\n",
    }
    script = bundle(files)
    assert script.index("m_a_js =") < script.index("m_p_b_js =") < script.index("m_main_js =")
    assert "const { b, c: d } = m_p_b_js;" in script and "return { b, c };" in script
    assert script.count("const m_a_js") == 1


@pytest.mark.parametrize(
    "text",
    [
        'import x from "./a.js";\n',
        'import * as x from "./a.js";\n',
        'import "./a.js";\n',
        "export default 3;\n",
        "export { a };\n",
        'export { a } from "./a.js";\n',
        'import { main } from "./main.js";\n',
    ],
)
def test_what_is_in_another_form_is_refused_and_not_lost(text: str) -> None:
    with pytest.raises(ValueError, match=r"main\.js"):
        bundle({"main.js": text, "a.js": "export const a = 1;\n"})


def test_our_own_modules_keep_to_the_two_forms_and_to_texts() -> None:
    ours = {path: each.body.decode() for path, each in assets().items() if path.endswith(".js")}
    assert len(bundle(ours)) > 50_000
    for path, text in ours.items():
        if not path.startswith("vendor/"):
            assert not re.search(
                r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|\beval\b|new Function", text
            ), path
    index = assets()["index.html"].body.decode()
    for path in ours:
        assert f"static/{path}" in index, f"{path} is not asked for at once"


# -- commands -----------------------------------------------------------------------------------------------------


def test_a_report_is_written_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "runs" / "one", SMALL)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report"]) == 0
    assert (
        capsys.readouterr().out.startswith("one.html  0.")
        and (tmp_path / "one.html").stat().st_size > 100_000
    )
    assert cli.run(["report", "runs/one", "-o", "x.html", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"file": "x.html", "bytes": (tmp_path / "x.html").stat().st_size}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["report"], "there is no run below runs"),
        (["report", "nothing"], "there is no run nothing"),
        (["report", "."], ". is no run directory"),
        (["report", "file"], "there is no run file"),
        (["dashboard", "nothing"], "there is no run nothing"),
        (["dashboard"], "there is no folder runs"),
        (["dashboard", ".", "--host", "0.0.0.0"], "for everybody"),
        (["dashboard", ".", "--tokens", "nothing"], "cannot be read"),
        (["dashboard", "--port", "70000"], "70000 is not in the range"),
    ],
)
def test_what_cannot_be_shown_is_told_with_what_to_do(
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.run(argv) != 0
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and len(said.splitlines()) == 2


def test_a_port_that_is_taken_is_told_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.run(["dashboard", str(tmp_path), "--port", str(taken.getsockname()[1])]) != 0
    assert "is in use" in capsys.readouterr().err
