"""The YAML that is written comes back as the data it was, whoever reads it, and looks as if a person had written it."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zml.obs.emit import Said, scalar, to_yaml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["yes", "no", "on", "off", "y", "null", "~", "1e5", "0x1f", "12:30:00", "5m", "1_000", ".5", "-", "- a", "a: b",
     "a #b", "#", "{{ $labels.x }}", "*a", "&a", "!b", "%", "@", "`", "'", '"', "\\", "a\nb", "a\n", "\n", " a\nb",
     "a\n\nb", "a \nb", "\ta\nb", "x\n  y", "2026-01-01", "=", "<<", "?", "|", ">"]
)  # fmt: skip
DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, DATA, min_size=1, max_size=4) | st.lists(DATA, min_size=1, max_size=4))
def test_what_is_written_comes_back(data: Any) -> None:
    assert yaml.safe_load(to_yaml(data)) == data


@given(st.dictionaries(TEXT, DATA, min_size=1, max_size=4), TEXT)
def test_comments_change_nothing(data: dict[str, Any], said: str) -> None:
    commented = {key: Said(said, value) for key, value in data.items()}
    nested = {"list": [Said(said, value) for value in data.values()], "deep": [commented]}
    assert yaml.safe_load(to_yaml(nested, head=said)) == {"list": list(data.values()), "deep": [data]}


def test_it_reads_well() -> None:
    data = {
        "groups": [
            {
                "name": "zml",
                "expr": "a\n> 1",
                "for": "5m",
                "on": Said("Why.", ["x", "on", {"z": {}}]),
            }
        ]
    }
    assert to_yaml(data, "Head.") == (
        "# Head.\n\n"
        "groups:\n"
        "  - name: zml\n"
        "    expr: |-\n"
        "      a\n"
        "      > 1\n"
        "    for: 5m\n"
        "    # Why.\n"
        '    "on":\n'
        "      - x\n"
        '      - "on"\n'
        "      - z: {}\n"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"x"])
def test_what_has_no_plain_form_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        scalar(value)
