"""A worker that comes late to a job whose learning rate has changed since, where its own optimizer makes the steps."""

import json
import re

import pytest

from tests.e2e.harness import Playground

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

# After the harness' script has made its optimizer and scheduler: each step says what it is made with.
SAYS = """
opt.register_step_pre_hook(lambda o, args, kwargs: print(f"rate {epoch} {o.param_groups[0]['lr']!r}", flush=True))
train = zml.join("""


def rates(text: str) -> list[tuple[int, float]]:
    return [
        (int(epoch), float(rate)) for epoch, rate in re.findall(r"^rate (\d+) (\S+)$", text, re.MULTILINE)
    ]


@pytest.mark.soak
def test_a_late_worker_steps_with_the_others_learning_rate(place: Playground) -> None:
    script = (place.folder / "train.py").read_text()
    (place.folder / "late.py").write_text(script.replace("\ntrain = zml.join(", SAYS))
    run = place.start(
        *("run", "-w", "2", "-p", "1", "--compress", "topk:10%", "--warm-up-steps", "0", "late.py"),
        *("--schedule", "cosine", "--epochs", "30", "--pause", "0.02"),
    )
    place.until(lambda: "epoch 2 done" in place.script_lines("w0"), "training goes on")
    here = json.loads((place.run_dir() / "coordinator.json").read_text())
    (address,) = [a for a in here["addresses"] if a.startswith("tcp:")]
    late = place.start("worker", "--cpu", "--coordinator", address)
    place.until(lambda: rates(late.text), "the late worker trains")
    assert run.wait() == 0, run.text
    assert late.wait() == 0, late.text
    senior = dict(rates(place.script_lines("w0")))
    theirs = rates(late.text)
    assert theirs[0][0] >= 2 and len(set(senior.values())) > 10, "the rate changes with every epoch"
    assert [rate for _, rate in theirs] == [senior[epoch] for epoch, _ in theirs]
