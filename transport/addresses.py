"""Addresses, as ZeroMQ writes them: what may be bound, and what is on this machine.

Rule: what is reachable from other machines needs keys, and nobody's socket is taken away.
"""

import ipaddress
import os
import socket as unix
from typing import Final

from .errors import AddressInUse, BadAddress, OpenBind

IPC_CHARS: Final = 107  # sun_path


def check_bind(address: str, keys: bool) -> None:
    """Raises BadAddress for what is no address, OpenBind for one that needs keys and has none."""
    transport, _, rest = address.partition("://")
    if transport == "ipc" and rest:
        if len(os.fsencode(rest)) > IPC_CHARS:
            raise BadAddress(address, f"the path is longer than {IPC_CHARS} bytes: choose a shorter folder")
        if not os.path.isdir(os.path.dirname(rest) or "."):
            raise BadAddress(address, "there is no such folder")
        if _somebody_listens(rest):
            raise AddressInUse(address)  # ZeroMQ would take the path away from whoever listens there
        return
    host, _, port = rest.rpartition(":")
    if transport != "tcp" or not host or not (port.isdecimal() and int(port) < 65_536):
        raise BadAddress(address, "an address is tcp://HOST:PORT or ipc://PATH")
    if not keys and not _is_loopback(host):
        raise OpenBind(address)


def is_here(address: str) -> bool:
    """Is it an address of this machine alone?"""
    return address.startswith("ipc://") or _is_loopback(address.partition("://")[2].rpartition(":")[0])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name or an interface: it may be anywhere


def _somebody_listens(path: str) -> bool:
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # ZeroMQ has removed it already, or the folder is gone
