"""Real processes on a node that does not see the coordinator's folder: all that they print and log gets there."""

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.harness import Playground
from tests.e2e.test_jobs import Cluster, is_over
from tests.e2e.test_streaming import elsewhere

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

TALKS = """
import itertools, threading, time
def talk():
    for number in itertools.count():
        print(f"line {number}", flush=True)
        time.sleep(0.02)
threading.Thread(target=talk, daemon=True).start()
"""


def contents(folder: Path) -> dict[str, bytes]:
    """What processes have printed and logged there, by name."""
    files = [path for path in folder.glob("*") if path.suffix in (".out", ".log", ".jsonl")]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs the `unshare` command")
def test_output_gets_to_a_coordinator_that_is_killed_meanwhile_whole(place: Playground) -> None:
    cluster = Cluster(place)
    cluster.node("n1", prefix=elsewhere(cluster.folder))
    (place.folder / "talks.py").write_text(TALKS + (place.folder / "train.py").read_text())
    job = cluster.submit("--epochs", "4", "--pause", "0.05", script="talks.py")
    server = ["--server", cluster.here()["http"]]
    there = cluster.folder / "jobs" / job / "1" / "logs"
    follower = place.start("job", "logs", "-f", job, *server, name="follower")
    place.until(
        lambda: b"epoch 0 done" in contents(there).get("w0.out", b""), "it is heard of the first epoch"
    )
    (here,) = place.folder.glob(f"runs/away/*/n1/jobs/{job}/1/logs")

    cluster.coordinator.send(signal.SIGKILL)
    cluster.coordinator.wait()
    before = contents(there)["w0.out"]
    place.until(lambda: contents(here)["w0.out"] != before, "it prints while nobody is there to be told")
    cluster.start()
    done = cluster.until(job, is_over, f"{job} is over")

    assert (done["state"], len(done["attempts"])) == ("SUCCEEDED", 1), done
    expected = contents(here)
    assert {"w0.out", "w0.out.jsonl", "w0.jsonl", "p0.jsonl"} <= expected.keys()
    got = contents(there)
    assert {name: got.get(name) for name in expected} == expected
    # A line's end is written by itself: the other thread may come between.
    assert all(b"epoch %d done" % epoch in got["w0.out"] for epoch in range(4))
    for name in ("w0.out", "p0.jsonl"):
        code, text = place.run("job", "logs", job, name, *server)
        assert (code, text.encode()) == (0, expected[name])
    assert follower.wait() == 0
    # And what the follower says of itself, in the midst of that.
    shown = re.sub(r"zml: no coordinator [^\n]*\n", "", follower.text)
    assert shown.endswith(expected["w0.out"].decode())
