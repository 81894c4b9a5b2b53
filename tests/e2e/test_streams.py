"""A stream that says where it stands, through deaths of a script and of everything: every sample counts once."""

import pytest
from safetensors.torch import load_file

from tests.e2e.harness import Playground
from tests.e2e.test_resume import killed_after
from zml.checkpoint import newest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

# Each sample takes one from its own parameter, whoever computes it, so that the model says how often each has counted.
SCRIPT = """
import json, os, time
import torch
import zml
from torch.utils.data import DataLoader, IterableDataset

SAMPLES, EPOCHS, SIZE = 1440, 3, 4
seat = json.loads(os.environ["ZML_SEAT"])

class Numbers(IterableDataset):
    part, at, begin = (0, 1), 0, 0
    def zml_shard(self, index, count):
        self.part = index, count
    def __iter__(self):
        index, count = self.part
        self.at, self.begin = self.begin, 0
        while index + count * self.at < SAMPLES:
            self.at += 1
            yield index + count * (self.at - 1)
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.begin = state["at"]

model = torch.nn.Module()
model.counts = torch.nn.Parameter(torch.zeros(SAMPLES))
opt = torch.optim.SGD(model.parameters(), lr=1.0)
train = DataLoader(Numbers(), batch_size=SIZE)
train = zml.join(model, opt, train, batches=SAMPLES // SIZE // EPOCHS)
steps = 0
for epoch in zml.epochs(EPOCHS):
    for numbers in train:
        if seat["worker"] == "w1" and seat["incarnation"] == 1 and steps == 12:
            os.kill(os.getpid(), 9)
        model.counts[numbers].sum().backward()
        opt.step()
        opt.zero_grad()
        steps += 1
        time.sleep(0.02)
zml.save("counts.safetensors")
"""


def test_every_sample_of_a_stream_counts_once_whoever_dies(place: Playground) -> None:
    (place.folder / "count.py").write_text(SCRIPT)
    flags = ["-w", "2", "-p", "2", "--async", "--checkpoint-steps", "15"]
    first = killed_after(place, 90, *flags, "count.py")
    found, _ = newest(first / "checkpoints")
    assert found is not None and "streams.json" in found.manifest.files
    code, text = place.run("resume", str(first), "-w", "3", "-p", "1")
    assert code == 0, text
    assert f"resuming at step {found.manifest.step:,}, in epoch {found.manifest.epoch + 1}" in text
    counts = -load_file(place.folder / "counts.safetensors")["counts"]
    wrong = {number: float(count) for number, count in enumerate(counts) if count != 1}
    assert not wrong, text
