"""Text of strangers for the eyes: a script may print what it likes, and must not move our cursor or forge our lines.

Escape sequences go whole (ECMA-48: CSI, OSC and the other strings, the two-byte ones); what is left of control
characters, of those that turn the direction of writing (https://www.unicode.org/reports/tr9/, "Trojan Source",
https://trojansource.codes) and of lone surrogates becomes U+FFFD. Only the line feed and the tab stay: whoever prints a
text of several lines indents the second, so that it cannot pass for a line of its own.
"""

import os
import re
from collections.abc import Mapping

# A string that nobody ends (OSC without its terminator) goes up to the end of its line.
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def strip(text: str) -> str:
    """Without colours and other escape sequences."""
    return ESCAPES.sub("", text) if "\x1b" in text or "\x9b" in text else text


def harmless(text: str) -> str:
    """What can be printed anywhere, line feeds and tabs but for which all is visible."""
    if text.isprintable():
        return text
    return HARMFUL.sub("\ufffd", strip(text).replace("\r\n", "\n"))


def printable(text: str) -> str:
    """One line of it, every character of which is seen: what moves a cursor or ends a line becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def coloured(environ: Mapping[str, str] = os.environ) -> bool:
    """Does whoever started this want colours, where there is a terminal? https://no-color.org"""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
