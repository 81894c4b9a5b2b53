"""What travels in a header is W3C Trace Context, and what cannot be read is no error."""

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from zml.messages import Commit, Pull
from zml.tracing.span import LENGTH, MOST_KEPT, Context, parse, read_header, traceparent, write_header

contexts = st.builds(Context, st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
EXAMPLE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"  # the one of the specification


def test_the_specifications_example_is_read_and_written() -> None:
    context = Context(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, True)
    assert parse(EXAMPLE) == context
    assert traceparent(context) == EXAMPLE
    assert parse(EXAMPLE[:-2] + "00") == context._replace(sampled=False)
    assert parse(EXAMPLE[:-2] + "03") == context, "other flags are for others"


@given(contexts, st.lists(contexts, max_size=MOST_KEPT))
def test_a_header_is_read_as_it_was_written(own: Context, kept: list[Context]) -> None:
    text = write_header(own, kept)
    assert len(text) == LENGTH + (LENGTH + 1) * len(kept)
    assert read_header(text) == (own, kept)


@given(
    st.text(max_size=400)
    | st.lists(st.sampled_from([EXAMPLE, "", " ", "00-", "x"]), max_size=9).map(" ".join)
)
@example(EXAMPLE.upper())
@example("00-" + 32 * "0" + "-00f067aa0ba902b7-01")
@example("00-4bf92f3577b34da6a3ce929d0e0e4736-" + 16 * "0" + "-01")
@example("ff" + EXAMPLE[2:])
@example("00-4bf92f3577b34da6a3ce929d0e0e473\N{ARABIC-INDIC DIGIT SIX}-00f067aa0ba902b7-01")
@example(EXAMPLE + "\n")
def test_what_cannot_be_read_is_no_context(text: str) -> None:
    own, kept = read_header(text)
    for context in (own, *kept):
        assert context is None or traceparent(context)[:-1] in text
    assert len(kept) <= MOST_KEPT


def test_a_message_without_a_trace_does_not_carry_the_field() -> None:
    me = {"job": "job", "worker": "w0", "incarnation": 1}
    for message in (
        Commit(**me, clock=3, buckets=2),  # type: ignore[arg-type]
        Pull(**me, clock=3, bucket=0, have=[1]),  # type: ignore[arg-type]
    ):
        plain = msgspec.msgpack.encode(message)
        assert b"trace" not in plain
        traced = msgspec.structs.replace(message, trace=EXAMPLE)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(traced), type=type(message)) == traced
        assert msgspec.msgpack.decode(plain, type=type(message)) == message
