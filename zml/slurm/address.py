"""Which of a node's addresses the other nodes reach.

Rule: never the loopback by accident. On many clusters a node's own name resolves to 127.0.1.1, and some names resolve
nowhere; a coordinator that listened there would wait for members that cannot come. So the first address that is this
machine's own and no loopback is taken, in the order: the interface that was asked for; what Slurm calls the node's
address; its name; and the loopback only for one node, or where Slurm says itself that its nodes are there.
"""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence

from ..errors import ALLOCATION, ZmlError

SIOCGIFADDR = 0x8915
ANY_UDP_PORT = 9  # nothing is sent: connecting a UDP socket only chooses a route


def choose(found: Sequence[tuple[str, str]], nodes: int) -> str:
    """`found` are (whose, address) of this machine, the best first; "NodeAddr" is what Slurm says. Raises ZmlError."""
    for _, address in found:
        if not ipaddress.ip_address(address).is_loopback:
            return address
    for whose, address in found:
        if nodes == 1 or whose == "NodeAddr":
            return address
    names = ", ".join(f"{whose} {address}" for whose, address in found) or "no name of it resolves"
    raise ZmlError(
        ALLOCATION,
        f"{socket.gethostname()} has no address that the other nodes could reach: {names}",
        "Say which network to use with --interface, ib0 or eth0 say.",
    )


def own(node_address: str, node: str, nodes: int, interface: str = "") -> str:
    """The address of this machine for an allocation of so many nodes. Raises ZmlError."""
    if interface:
        return of_interface(interface)
    found = []
    names = [("NodeAddr", node_address), (node, node), (socket.gethostname(), socket.gethostname())]
    for whose, name in names:
        found += [(whose, address) for address in resolve(name) if is_mine(address)]
    if nodes == 1:
        found.append(("loopback", "127.0.0.1"))
    return choose(found, nodes)


def towards(peer: str) -> str:
    """The address by which this machine reaches a peer, and the peer it. Raises ZmlError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, ANY_UDP_PORT))
        except OSError as error:
            raise ZmlError(
                ALLOCATION, f"{socket.gethostname()} has no route to {peer}: {error.strerror}"
            ) from None
        address: str = probe.getsockname()[0]
        return address


def of_interface(name: str) -> str:
    """Raises ZmlError that says which interfaces there are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            there = ", ".join(interface for _, interface in socket.if_nameindex())
            what = f"{socket.gethostname()} has no network interface {name} with an IPv4 address"
            raise ZmlError(ALLOCATION, what, f"Choose one of: {there}.") from None
    return socket.inet_ntoa(answer[20:24])


def resolve(name: str) -> list[str]:
    """IPv4 addresses; none where nobody knows the name."""
    if not name:
        return []
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_mine(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True
