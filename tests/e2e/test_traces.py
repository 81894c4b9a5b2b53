"""A real run and a real receiver of OTLP over HTTP: what Jaeger would be shown."""

from collections import Counter

import pytest

from tests.e2e.harness import Playground
from tests.zml.tracing.receiver import Received, Receiver

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

FAILS_AT = 9
SCRIPT = f"""
import os, torch, zml
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Linear(300, 300)  # two chunks, one for each shard
opt = torch.optim.SGD(model.parameters(), lr=0.01)
data = zml.join(model, opt, DataLoader(TensorDataset(torch.randn(160, 300)), batch_size=4))
step = 0
for epoch in zml.epochs(1):
    for (x,) in data:
        if step == {FAILS_AT} and '"w1"' in os.environ["ZML_SEAT"]:
            raise KeyError("patient 17")
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        step += 1
"""


def test_one_trace_shows_a_step_of_two_workers_and_two_shards_and_why_the_run_failed(
    place: Playground,
) -> None:
    (place.folder / "train.py").write_text(SCRIPT)
    with Receiver() as receiver:
        command = ("run", "-w", "2", "-p", "2", "--cpu", "--trace", "1/4", "train.py")
        code, text = place.run(*command, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
    assert code == 1, text
    spans = receiver.spans
    assert {(span.service, span.instance) for span in spans} == {
        ("zml-worker", "w0"),
        ("zml-worker", "w1"),
        ("zml-shard", "p0"),
        ("zml-shard", "p1"),
        ("zml-coordinator", "coordinator"),
    }

    steps = [span for span in spans if span.name == "zml.step"]
    kept = {(span.instance, span.attributes["zml.clock"]): span.attributes["zml.kept"] for span in steps}
    wanted = sorted(clock for (worker, clock), why in kept.items() if (worker, why) == ("w0", "sampled"))
    assert {clock // 4 for clock in wanted} >= {0, 1}, "one of every four"
    assert all(kept["w1", clock] == "sampled" for clock in wanted if clock < FAILS_AT), "the same on both"
    wanted = [clock for clock in wanted if clock < FAILS_AT]
    for clock in wanted:
        [trace] = {span.trace for span in steps if span.attributes["zml.clock"] == clock}
        whole([span for span in spans if span.trace == trace])

    [failed] = [span for span in steps if span.attributes["zml.kept"] == "failed" and span.instance == "w1"]
    assert (failed.attributes["zml.clock"], failed.error) == (FAILS_AT, "KeyError"), "and no word of its data"
    [checkpoint] = [span for span in spans if span.name == "zml.checkpoint"]
    written = [span for span in spans if span.name == "zml.ps.write"]
    assert {(span.instance, span.trace) for span in written} == {
        ("p0", checkpoint.trace),
        ("p1", checkpoint.trace),
    }


def whole(spans: list[Received]) -> None:
    """A clock of two workers and two shards, each span within its parent by the one clock of this machine."""
    by_id = {span.span: span for span in spans}
    slack_ns = 2_000_000  # two processes read that clock in their own way
    for span in spans:
        assert (span.parent == "") == (span.name == "zml.step")
        if span.parent:
            above = by_id[span.parent]
            assert above.began - slack_ns <= span.began <= span.ended <= above.ended + slack_ns, (above, span)
    below = Counter((by_id[span.parent].name, span.name, span.instance[0]) for span in spans if span.parent)
    thread = {("zml.step", f"zml.{name}", "w") for name in ("data", "compute", "encode", "wait", "apply")}
    assert {key for key in below if key in thread} >= thread - {("zml.step", "zml.data", "w")}
    assert {key: number for key, number in below.items() if key not in thread} == {
        ("zml.step", "zml.push", "w"): 4,
        ("zml.step", "zml.pull", "w"): 4,
        ("zml.push", "zml.ps.push", "p"): 4,
        ("zml.push", "zml.ps.apply", "p"): 2,
        ("zml.pull", "zml.ps.pull", "p"): 4,
    }
