"""Learning rate schedules: a worker that comes late has the very rates of one that was there all the time."""

import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedules

from zml.worker.schedules import MOST_BYTES, Schedules, Told, find, kind, read, tell, write

S = torch_schedules
EPOCHS, STEPS = 9, 3
LOSSES = [3.0, 2.0, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5]
PER_STEP = {"OneCycleLR", "CyclicLR"}
MAKERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: S.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 4, 4, 7], 0.3),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, EPOCHS),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.5, total_steps=EPOCHS * STEPS),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, 4),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, total_iters=3), S.CosineAnnealingLR(o, EPOCHS)], [3]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ExponentialLR(o, 0.9), S.StepLR(o, 3, 0.5)]),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9 + 0.01 * epoch),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, cooldown=1, factor=0.5),
}


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """Schedulers are looked for among all objects: what this process has of other tests is not to be gone through."""
    gc.freeze()
    yield
    gc.unfreeze()


class Script:
    """A script's optimizer and scheduler, and its loop without the model."""

    def __init__(self, make: Callable[[Optimizer], Any], optimizer: str = "SGD") -> None:
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}]
        if optimizer == "SGD":
            self.optimizer: Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        self.scheduler = make(self.optimizer)
        self.schedules = Schedules(self.optimizer, "w0")

    def epoch(self, number: int, per_step: bool) -> list[Any]:
        """All numbers of the groups at each step."""
        seen = []
        for _ in range(STEPS):
            self.optimizer.step()
            seen.append(numbers(self.optimizer))
            if per_step:
                self.scheduler.step()
        if isinstance(self.scheduler, S.ReduceLROnPlateau):
            self.scheduler.step(LOSSES[number])
        elif not per_step:
            self.scheduler.step()
        return seen


def numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "SGD") for name in MAKERS), *((name, "AdamW") for name in sorted(PER_STEP))],
)
def test_a_late_worker_has_the_same_numbers_from_its_first_step_on(
    name: str, at: int, optimizer: str
) -> None:
    senior, late = (Script(MAKERS[name], optimizer) for _ in range(2))
    for epoch in range(at):
        senior.epoch(epoch, name in PER_STEP)
    note = senior.schedules.note(at)
    assert len(note) < MOST_BYTES and name.encode() in note
    with capture_logs() as logs:
        late.schedules.begin(at, note, None)
    assert [line["event"] for line in logs] == ["learning rate taken over"], logs
    for epoch in range(at, EPOCHS):
        assert senior.epoch(epoch, name in PER_STEP) == late.epoch(epoch, name in PER_STEP)
    ours, theirs = (script.schedules.look().tell(0) for script in (senior, late))
    assert ours == theirs


def test_in_the_first_epoch_nothing_is_taken_over() -> None:
    senior, other = (Script(MAKERS["StepLR"]) for _ in range(2))
    before = numbers(other.optimizer)
    senior.optimizer.param_groups[0]["lr"] = 7.0
    with capture_logs() as logs:
        other.schedules.begin(0, senior.schedules.note(0), None)
    assert numbers(other.optimizer) == before and logs == []


def test_who_finds_no_note_or_an_old_one_says_so() -> None:
    senior, late = (Script(MAKERS["StepLR"]) for _ in range(2))
    with capture_logs() as logs:
        late.schedules.begin(3, b"", None)
    assert [(line["log_level"], line["epoch"]) for line in logs] == [("warning", 3)]
    senior.optimizer.step()
    senior.scheduler.step()
    with capture_logs() as logs:
        late.schedules.begin(3, senior.schedules.note(2), None)
    assert logs[-1]["what"] == ["it is told of epoch 3, and this is epoch 4"]
    assert numbers(senior.optimizer) == numbers(late.optimizer)


def test_what_a_checkpoint_kept_of_this_epoch_comes_before_the_note() -> None:
    senior, late = (Script(MAKERS["OneCycleLR"]) for _ in range(2))
    note = senior.schedules.note(0)
    senior.epoch(0, per_step=True)
    kept, _ = senior.schedules.tell(0)
    for epoch, same in ((1, False), (0, True)):
        late.schedules.begin(epoch, note, kept)
        assert (numbers(senior.optimizer) == numbers(late.optimizer)) is same, epoch


def test_only_this_optimizers_outermost_living_schedulers_are_found() -> None:
    script, other = Script(MAKERS["SequentialLR"]), Script(MAKERS["StepLR"])
    assert [kind(each) for each in find(script.optimizer)] == ["SequentialLR(LinearLR, CosineAnnealingLR)"]
    assert find(other.optimizer) == [other.scheduler]
    assert len(script.schedules.tell(0)[0].schedulers) == 1, "whoever has not looked yet looks then"
    script.scheduler = None
    gc.collect()
    assert script.schedules.tell(0)[0].schedulers == []


def test_who_was_found_before_a_script_freezes_what_it_has_made_is_known_behind_it() -> None:
    script = Script(MAKERS["StepLR"])
    script.schedules.look()
    gc.freeze()
    assert find(script.optimizer) == []
    later = S.ExponentialLR(script.optimizer, 0.9)
    told = read(script.schedules.note(0))
    assert told is not None and [name for name, _ in told.schedulers] == ["ExponentialLR", "StepLR"]
    both = S.ChainedScheduler([script.scheduler, later])
    told = read(script.schedules.note(1))
    assert told is not None and [name for name, _ in told.schedulers] == [kind(both)]


def test_of_two_of_one_kind_each_gets_its_own() -> None:
    def two(optimizer: Optimizer) -> list[Any]:
        return [S.StepLR(optimizer, 2, 0.5), S.StepLR(optimizer, 3, 0.1)]

    senior = Script(two)
    late = Script(lambda optimizer: list(reversed(two(optimizer))))
    for _ in range(4):
        senior.optimizer.step()
        for scheduler in senior.scheduler:
            scheduler.step()
    late.schedules.begin(4, senior.schedules.note(4), None)
    for scheduler, made in zip(late.scheduler, ((3, 0.1), (2, 0.5)), strict=True):
        assert (scheduler.step_size, scheduler.gamma, scheduler.last_epoch) == (*made, 4)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("CosineAnnealingLR", ["CosineAnnealingLR is only here", "StepLR is not here"]),
        ("SequentialLR", ["SequentialLR(LinearLR, CosineAnnealingLR) is only here", "StepLR is not here"]),
    ],
)
def test_where_kinds_differ_the_numbers_are_kept_and_the_rest_is_named_once(
    here: str, said: list[str]
) -> None:
    senior, late = Script(MAKERS["StepLR"]), Script(MAKERS[here])
    for epoch in range(2):
        senior.epoch(epoch, per_step=False)
    with capture_logs() as logs:
        late.schedules.begin(2, senior.schedules.note(2), None)
    assert [line["what"] for line in logs if line["log_level"] == "warning"] == [said]
    assert [group["lr"] for group in late.optimizer.param_groups] == [0.05, 0.01]
    assert late.scheduler.last_epoch == 0


def test_where_groups_differ_in_number_none_gets_anothers_numbers() -> None:
    senior, late = Script(MAKERS["StepLR"]), Script(MAKERS["StepLR"])
    late.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 3.0})
    senior.epoch(0, per_step=False)
    with capture_logs() as logs:
        late.schedules.begin(1, senior.schedules.note(1), None)
    assert logs[-1]["what"][-1] == "3 parameter groups are here, and 2 there"
    assert [group["lr"] for group in late.optimizer.param_groups] == [0.1, 0.02, 3.0]
    assert late.scheduler.last_epoch == 1


class Warm:
    """A callable with numbers of its own: these travel, as in torch's state_dict."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls = 0
        self.lock = object()

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return self.factor


def test_code_does_not_travel_and_what_cannot_is_named_once() -> None:
    senior, late = (Script(lambda o: S.LambdaLR(o, [Warm(0.5), lambda epoch: 0.1])) for _ in range(2))
    senior.epoch(0, per_step=False)
    with capture_logs() as logs:
        for epoch in (1, 2):
            senior.schedules.note(epoch)
    assert [line["what"] for line in logs] == [["LambdaLR.lr_lambdas.lock"]]
    senior.scheduler.lr_lambdas[0].calls = 17
    late.schedules.begin(1, senior.schedules.note(1), None)
    assert late.scheduler.lr_lambdas[0].calls == 17
    assert late.scheduler.last_epoch == 1 and numbers(late.optimizer) == numbers(senior.optimizer)


def test_flags_of_a_device_are_each_workers_own_and_a_tensor_stays_the_same() -> None:
    def make(lr: float, flag: bool | None) -> Optimizer:
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        return torch.optim.AdamW(parameters, lr=torch.tensor(lr), foreach=flag, capturable=False)

    senior, late = make(0.125, None), make(0.5, False)
    tensor = late.param_groups[0]["lr"]
    Schedules(late, "w1").begin(1, Schedules(senior, "w0").note(1), None)
    assert late.param_groups[0]["lr"] is tensor and float(tensor) == 0.125
    assert late.param_groups[0]["foreach"] is False


def test_a_note_has_a_size_and_what_is_too_long_is_named() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(700)]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.1)
    schedulers = [S.StepLR(optimizer, 1), S.LambdaLR(optimizer, lambda epoch: 1.0)]
    assert find(optimizer) and schedulers
    told, left_out = tell(optimizer, find(optimizer), 1)
    assert len(told.groups) == 700
    for scheduler in schedulers:
        scheduler.__dict__["history"] = list(range(10_000))
    told, left_out = tell(optimizer, find(optimizer), 1)
    assert left_out == ["LambdaLR: too long", "StepLR: too long"]
    assert len(write(told)) <= MOST_BYTES


@pytest.mark.parametrize(
    "note",
    [
        b"\xff",
        b"[]",
        b'{"epoch": "x"}',
        b'{"epoch": 1, "more": 2}',
        b'{"epoch": 1, "groups": [1]}',
        b'{"epoch": 1, "schedulers": [["StepLR"]]}',
        b'{"epoch": 1, "schedulers": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b" " * (MOST_BYTES + 1),
    ],
    ids=lambda note: note[:30].decode(errors="replace"),
)
def test_what_is_no_note_is_refused_whole(note: bytes) -> None:
    assert read(note) is None


@pytest.mark.parametrize(
    "state",
    [
        {"gamma": "fast"},
        {"base_lrs": [0.1]},
        {"base_lrs": {"0": 1}},
        {"step": 3, "load_state_dict": 1},
        {"_schedulers": [{}]},
        {"last_epoch": [1]},
        {"last_epoch": None},
    ],
    ids=str,
)
def test_values_of_another_kind_change_nothing(state: dict[str, Any]) -> None:
    late = Script(MAKERS["StepLR"])
    before = late.scheduler.state_dict() | {}
    note = json.dumps({"epoch": 1, "groups": [{}, {"lr": "x"}], "schedulers": [["StepLR", state]]}).encode()
    with capture_logs() as logs:
        late.schedules.begin(1, note, None)
    after = late.scheduler.state_dict()
    assert {key: after[key] for key in before} == before
    assert "lr of group 1" in logs[-1]["what"]
    late.epoch(0, per_step=False)


def test_what_was_told_is_read_as_it_was() -> None:
    script = Script(MAKERS["ReduceLROnPlateau"])
    told, _ = script.schedules.look().tell(4)
    assert read(write(told)) == Told(4, told.groups, told.schedulers)
    assert dict(told.schedulers)["ReduceLROnPlateau"]["best"] == "inf", "JSON has no such number"
