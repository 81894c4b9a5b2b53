"""Names: what is a member id, and what only looks like one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.scheduler.ids import HIGHEST, Name, member_id, read_id, shard_id, worker_id


def test_the_letter_is_the_role() -> None:
    assert worker_id(0) == "w0" and shard_id(12) == "p12"
    assert read_id("w0") == Name("worker", 0) and read_id("p12") == Name("shard", 12)


@pytest.mark.parametrize(
    "text", ["", "w", "w-1", "w01", "w1 ", " w1", "W1", "x1", "w1.0", "w²", "w٣", "p99999", "w" * 9]
)
def test_what_is_no_member_id_is_not_read(text: str) -> None:
    assert read_id(text) is None


@given(st.sampled_from(["worker", "shard"]), st.integers(0, HIGHEST))
def test_every_id_reads_back(role: str, number: int) -> None:
    name = Name("worker" if role == "worker" else "shard", number)
    assert read_id(member_id(name)) == name


@given(st.text(max_size=8))
def test_no_text_is_read_as_another_id_than_it_spells(text: str) -> None:
    name = read_id(text)
    assert name is None or member_id(name) == text
