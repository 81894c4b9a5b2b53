"""A training hangs: who it is, in which line, and whether the cluster is well besides."""

import json

import pytest

from tests.e2e.harness import Playground
from zml.runs import rundir

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(120)]

HANGS = """
import json, os, time
import torch, zml

def stuck():
    while True:
        time.sleep(60)

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
train = zml.join(model, optimizer, torch.utils.data.DataLoader(data, batch_size=4))
for epoch in zml.epochs(1):
    for step, (x, y) in enumerate(train):
        if step == 2 and json.loads(os.environ["ZML_SEAT"])["worker"] == "w1":
            print("stuck", flush=True)
            stuck()
        optimizer.zero_grad(); (model(x) - y).square().mean().backward(); optimizer.step()
"""


def test_a_worker_that_hangs_is_found_in_its_line_and_the_cluster_looked_at(place: Playground) -> None:
    (place.folder / "hangs.py").write_text(HANGS)
    run = place.start("run", "-w", "2", "-p", "1", "--cpu", "hangs.py")
    place.until(lambda: "stuck" in place.script_lines("w1"), "w1 hangs")
    listening = rundir.listening(place.run_dir())
    assert listening is not None

    code, text = place.run("stack", "w1")
    assert code == 0 and "In your code: hangs.py:7, in stuck" in text, text
    # The same without the run directory: w1's agent looks, or the process itself.
    address = next(each for each in listening.addresses if each.startswith("tcp://"))
    found = {}
    for member in ("w1", "p0"):
        code, text = place.run("stack", member, "--coordinator", address, "--json")
        assert code == 0, text
        found[member] = json.loads(text)
    assert (found["w1"]["own"]["function"], found["w1"]["own"]["line"]) == ("stuck", 7)
    assert found["p0"]["own"] is None and len(found["p0"]["threads"]) > 1

    code, text = place.run("doctor", "--cluster", "--json")
    told = json.loads(text)
    bad = [check for check in told["checks"] if check["verdict"] == "fail"]
    assert (code, bad, told["silent"]) == (0, [], {})
    assert {name: each["role"] for name, each in told["members"].items()} == {
        "coordinator": "coordinator",
        "p0": "shard",
        "w0": "worker",
        "w1": "worker",
    }
    links = {(each["from"], each["to"]): each for each in told["links"]}
    assert set(links) == {
        ("p0", "coordinator"), ("w0", "coordinator"), ("w1", "coordinator"), ("w0", "p0"), ("w1", "p0"),
    }  # fmt: skip
    assert all(each["rtt_s"] > 0 and each["trouble"] == "" for each in links.values())
    assert links["w0", "p0"]["up_bps"] > 0 and links["w0", "p0"]["down_bps"] > 0
    assert run.process.poll() is None  # it goes on, or would if w1 did
