"""What a terminal sends, as names of keys. Pure: bytes in, names out.

Printable characters are their own names. The sequences are those of xterm and of the Linux console (`man 4
console_codes`; "XTerm Control Sequences", PC-style function keys), which tmux and screen send, too.
"""

from __future__ import annotations

SEQUENCES = {
    b"[A": "up", b"[B": "down", b"[C": "right", b"[D": "left",
    b"OA": "up", b"OB": "down", b"OC": "right", b"OD": "left",
    b"[H": "home", b"[F": "end", b"OH": "home", b"OF": "end",
    b"[1~": "home", b"[4~": "end", b"[7~": "home", b"[8~": "end",
    b"[5~": "pageup", b"[6~": "pagedown", b"[Z": "backtab",
}  # fmt: skip
NAMED = {"\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\x08": "backspace"}
LONGEST = 16  # of a sequence; what is longer is none of ours


def decode(data: bytes, *, final: bool) -> tuple[list[str], bytes]:
    """The keys in `data`, and what may be the beginning of one. `final`: no more comes at once, so that an escape is
    the key of that name. Sequences that mean nothing here, and bytes that are no UTF-8, are passed over."""
    keys: list[str] = []
    while data:
        if data[0] == 0x1B:
            if len(data) == 1:
                return ([*keys, "esc"], b"") if final else (keys, data)
            taken = _sequence(data[1:])
            if taken is None:
                return (keys, b"") if final or len(data) > LONGEST else (keys, data)
            if taken == 0:  # an escape, and then another key
                keys.append("esc")
            elif (name := SEQUENCES.get(data[1 : 1 + taken])) is not None:
                keys.append(name)
            data = data[1 + taken :]
            continue
        size = _utf8(data[0])
        if len(data) < size and not final:
            return keys, data
        try:
            text = data[:size].decode()
        except UnicodeDecodeError:
            data = data[1:]
            continue
        if text in NAMED:
            keys.append(NAMED[text])
        elif text.isprintable():
            keys.append(text)
        data = data[size:]
    return keys, b""


def _sequence(rest: bytes) -> int | None:
    """How long the sequence behind an escape is; 0: it is none; None: it is not over yet."""
    if rest[:1] == b"O":
        return 2 if len(rest) > 1 else None
    if rest[:1] != b"[":
        return 0
    for index, byte in enumerate(rest[1:LONGEST], 2):
        if 0x40 <= byte <= 0x7E:
            return index
        if not 0x20 <= byte <= 0x3F:
            return index - 1  # broken off
    return None if len(rest) < LONGEST else LONGEST


def _utf8(first: int) -> int:
    """Bytes of the character that begins so."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
