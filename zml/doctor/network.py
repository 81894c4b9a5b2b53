"""Names, addresses and interfaces of a machine, and whether its clock is kept right."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path

from .findings import Check

# RFC 5737: addresses that belong to nobody. Nothing is sent: connecting a UDP socket only chooses a route.
NOWHERE = ("192.0.2.1", 9)
MTU_LEAST = 1400  # below it is a tunnel, and what is sent elsewhere at full size may get stuck in it
INTERFACES = Path("/sys/class/net")
IP_MTU = 14  # of <linux/in.h>: what the kernel knows of the path to a connected peer
STA_UNSYNC = 0x0040  # of <sys/timex.h>
TIME_ERROR = 5


def check_name_resolves(resolve: Callable[[str], str] = socket.gethostbyname) -> Check:
    host = socket.gethostname()
    try:
        address = resolve(host)
    except OSError as error:
        fix = "Add it to /etc/hosts, or give addresses instead of names."
        return Check("host name", "warn", f"{host} does not resolve: {error.strerror or error}", fix)
    # Debian's habit. No trouble, as members listen where they are told and not at the machine's name.
    within = ", which only this machine reaches" if address.startswith("127.") else ""
    return Check("host name", "pass", f"{host} is {address}{within}")


def check_loopback() -> Check:
    return _can_listen("loopback", "127.0.0.1")


def check_bind(address: Callable[[], str | None] = lambda: own_address()) -> Check:
    """At the address by which other machines would reach this one."""
    found = address()
    if found is None:
        return Check("listening", "pass", "no way to other machines: clusters of this machine only")
    return _can_listen("listening", found)


def _can_listen(name: str, address: str) -> Check:
    try:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            return Check(name, "pass", f"can listen on {address}, for example on port {port}")
    except OSError as error:
        symbol = errno.errorcode.get(error.errno or 0, "")
        fix = "Let this user open sockets there: a sandbox or a container's settings forbid it."
        return Check(name, "fail", f"cannot listen on {address}: {error.strerror} {symbol}".rstrip(), fix)


def own_address(peer: tuple[str, int] = NOWHERE) -> str | None:
    """The address by which this machine would speak to a peer; None where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(peer)
        except OSError:
            return None
        return str(probe.getsockname()[0])


def route_mtu(host: str, port: int) -> int:
    """The largest packet that goes to a peer in one piece, as far as the kernel knows; 0 where it does not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            ipaddress.IPv4Address(host)  # a name would have to be looked up, which takes its time
            probe.connect((host, port))
            return probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
        except (OSError, ValueError):
            return 0


def check_interfaces(folder: Path = INTERFACES) -> Check:
    """What packets of each network of this machine may measure."""
    found: dict[str, int] = {}
    for interface in sorted(folder.glob("*")):
        try:
            state = (interface / "operstate").read_text().strip()
            mtu = int((interface / "mtu").read_text())
        except (OSError, ValueError):
            continue
        if interface.name != "lo" and state in ("up", "unknown"):
            found[interface.name] = mtu
    told = ", ".join(f"{name} {mtu}" for name, mtu in found.items()) or "no network but the loopback"
    if tunnels := [name for name, mtu in found.items() if mtu < MTU_LEAST]:
        fix = f"Give members an address of another network, or `ip link set {tunnels[0]} mtu 1500`."
        return Check("MTU", "warn", told, fix)
    return Check("MTU", "pass", told)


class Timex(ctypes.Structure):
    """struct timex of <sys/timex.h>, as far as it is read here, and room for its rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def kernel_clock() -> tuple[int, int] | None:
    """State and status of adjtimex(2), which every user may read; None where there is no such call."""
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    if adjtimex is None:
        return None
    clock = Timex()  # modes 0: nothing is set
    state = adjtimex(ctypes.byref(clock))
    return None if state < 0 else (state, clock.status)


def check_clock(clock: Callable[[], tuple[int, int] | None] = kernel_clock) -> Check:
    found = clock()
    if found is None:
        return Check("clock", "pass", "the system does not say whether it is kept right")
    state, status = found
    if state == TIME_ERROR or status & STA_UNSYNC:
        fix = "Start chrony or systemd-timesyncd: logs of several machines are put in order by their clocks."
        return Check("clock", "warn", "nothing keeps it right", fix)
    return Check("clock", "pass", "kept right by a time service")


def in_use() -> int:
    """Open files of this process; -1 where that cannot be told."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # that of the look itself
    except OSError:
        return -1
