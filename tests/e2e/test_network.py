"""Separate machines, as network namespaces, with CURVE: members with keys train, strangers get nowhere."""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.harness import Playground, Process
from zml.transport.keys import Authorized, make_keys

pytestmark = [pytest.mark.cluster, pytest.mark.root, pytest.mark.timeout(240)]

numbers = itertools.count()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Namespaces around a router: host k is 10.77.k.2, on a wire of its own."""

    def __init__(self) -> None:
        self.tag = f"z{os.getpid() % 10_000}x{next(numbers)}"
        self.hub = f"{self.tag}h"
        self.names: list[str] = []

    def add(self, count: int) -> None:
        ip("netns", "add", self.hub)
        ip("netns", "exec", self.hub, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for index in range(count):
            name, wire = f"{self.tag}{index}", f"{self.tag}v{index}"
            ip("netns", "add", name)
            self.names.append(name)
            ip("link", "add", wire, "netns", self.hub, "type", "veth", "peer", "name", "eth", "netns", name)
            ip("-n", self.hub, "addr", "add", f"10.77.{index}.1/30", "dev", wire)
            ip("-n", self.hub, "link", "set", wire, "up")
            ip("-n", name, "addr", "add", f"{self.address(index)}/30", "dev", "eth")
            for device in ("lo", "eth"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "route", "add", "default", "via", f"10.77.{index}.1")

    def address(self, index: int) -> str:
        return f"10.77.{index}.2"

    def on(self, index: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[index]]

    def remove(self) -> None:
        for name in [*self.names, self.hub]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    made = Hosts()
    try:
        made.add(count)
        yield made
    finally:
        made.remove()


def coordinator_on(place: Playground, net: Hosts, index: int, *flags: str) -> tuple[Process, str]:
    bind = f"tcp://{net.address(index)}:0"
    started = place.start(
        "coordinator", "--bind", bind, "--keys", "keys", *flags, "train.py", prefix=net.on(index)
    )
    file = place.until(lambda: list(place.folder.glob("runs/*/coordinator.json")), "the coordinator listens")[
        0
    ]
    (address,) = json.loads(file.read_text())["addresses"]
    return started, address


def test_roles_on_separate_hosts_train_with_keys_and_strangers_get_nowhere(place: Playground) -> None:
    make_keys(place.folder / "keys", ["coordinator", "worker"])
    strange_keys(place.folder)
    quick = ["--config", "quick.toml"]
    (place.folder / "quick.toml").write_text("join_timeout_s = 3.0\n")
    with hosts(6) as net:
        coordinator, address = coordinator_on(place, net, 0, "-w", "3", "-p", "2")
        at = ["--coordinator", address]

        # Before anybody else: who has no key, or a key of its own making, does not come in.
        log = next(place.folder.glob("runs/*/logs/coordinator.jsonl"))
        without = place.start("worker", "--cpu", *at, *quick, prefix=net.on(5))
        assert without.wait() == 4 and "ZML-E202" in without.text, without.text
        place.until(lambda: '"rule":"handshake"' in log.read_text(), "who had no key is logged", 10)
        wrong = place.start("worker", "--cpu", *at, *quick, "--keys", "strange", prefix=net.on(5))
        assert wrong.wait() == 4 and "ZML-E202" in wrong.text, wrong.text
        place.until(lambda: "is not authorized" in log.read_text(), "the wrong key is logged", 10)
        assert not place.script_lines("w0")

        keys = ["--keys", "keys"]
        members = [
            place.start(
                "ps",
                "--shard",
                str(k),
                "--bind",
                f"tcp://{net.address(1 + k)}:0",
                *at,
                *keys,
                prefix=net.on(1 + k),
            )
            for k in range(2)
        ]
        members += [
            place.start("worker", "--cpu", "--name", f"w{k}", *at, *keys, prefix=net.on(3 + k % 3))
            for k in range(3)
        ]
        codes = [member.wait() for member in members]
        assert codes == [0] * 5, "\n".join(member.text for member in members)
        assert coordinator.wait() == 0, coordinator.text
    assert (place.folder / "model.safetensors").exists()
    assert place.status()["state"] == "SUCCEEDED"


def strange_keys(folder: Path) -> None:
    """A key that nobody authorized, in a folder that knows the true coordinator's public key."""
    make_keys(folder / "strange", ["worker"])
    true = Authorized(folder / "keys" / "authorized.toml").names["coordinator"]
    own = Authorized(folder / "strange" / "authorized.toml").names["worker"]
    text = f'listener = "coordinator"\n\n[authorized]\n"coordinator" = "{true}"\n"worker" = "{own}"\n'
    (folder / "strange" / "authorized.toml").write_text(text)
