"""Where something answers HTTP: HOST:PORT, and whether that is for this machine alone. It opens no socket."""

from __future__ import annotations

import ipaddress
import re

from .errors import USAGE, ZmlError

HOST = re.compile(r"[A-Za-z0-9._:%-]+")
PORT = 7078  # of a coordinator, unless it is told another, or that one is taken


def host_and_port(bind: str) -> tuple[str, int]:
    """Raises ZmlError for what is no address."""
    host, colon, port = bind.removeprefix("http://").rstrip("/").rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ZmlError(USAGE, f"{bind!r} is no address for HTTP", "Write HOST:PORT, such as 127.0.0.1:7078.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def host_of(address: str) -> str:
    """The host of http://HOST:PORT, and of nothing else: empty for all other text, which somebody may have made up."""
    try:
        host, port = host_and_port(address)
    except ZmlError:
        return ""
    return host if address == url(host, port) and HOST.fullmatch(host) else ""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_anywhere(host: str) -> bool:
    """All addresses of this machine: not one that others could call."""
    return host in ("0.0.0.0", "::", "*")


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def any_port(bind: str) -> str:
    """The same host, for one more process beside the first."""
    return bind if bind == "off" else f"{bind.rpartition(':')[0]}:0"
