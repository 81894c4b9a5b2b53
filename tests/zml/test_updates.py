"""The optimizer on the worker: what its steps changed leaves, and the model goes back to what was published."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.zml.test_hooks import JOB, ME, Direct, nothing
from zml.codec import UNKNOWN, by_name
from zml.codec.device import DevicePacker
from zml.errors import ZmlError
from zml.iothread import IoThread
from zml.layout import VECTORS, Layout, Registration, buckets
from zml.messages import Enter, JobSpec
from zml.messages import Seat as RosterSeat
from zml.plan import Plan
from zml.scheduler.ids import JobId
from zml.shard.shard import Shard
from zml.worker.binding import Binding
from zml.worker.traffic import Traffic
from zml.worker.updates import MOMENTUM, NORMALISED, Updates, keeps, outer_spec


class Twin:
    """The same model twice: one trained through zml with its optimizer on the worker, one by torch alone."""

    def __init__(
        self,
        io: IoThread,
        kind: str = "SGD",
        *,
        frozen: bool = False,
        momentum: float = 0.9,
        weights: dict[str, torch.Tensor] | None = None,
        **asked: Any,
    ) -> None:
        torch.manual_seed(3)
        self.model, self.plain = (
            torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
            for _ in range(2)
        )
        if weights is not None:
            self.model.load_state_dict(weights)
        self.plain.load_state_dict(self.model.state_dict())
        if frozen:
            self.model[0].weight.requires_grad_(False)
        numbers = {"lr": 0.1, "momentum": momentum} if kind == "SGD" else {"lr": 0.01}
        self.optimizer = getattr(torch.optim, kind)(self.model.parameters(), **numbers)
        self.plain_optimizer = getattr(torch.optim, kind)(self.plain.parameters(), **numbers)
        spec = JobSpec(optimizer_on="worker", **asked)
        layout = Layout.of(self.model, self.optimizer, chunk_elements=40, any_optimizer=True)
        registration = Registration(layout, outer_spec(), 1)
        placement = [0] * len(layout.chunks)
        shard = Shard(JobId(JOB), "p0")
        shard.assign(registration, placement, spec.staleness, spec.compress)
        shard.roster(1, [RosterSeat(ME, 1, True)])
        shard.handle(ME, Enter(JOB, ME, 1), None)
        self.direct = Direct(shard)
        cut = buckets(layout, placement, 1)
        self.told: list[str] = []
        plan = Plan.of(spec)
        self.traffic = Traffic(
            Binding(layout, self.model),
            cut,
            by_name(str(plan.compression)),
            self.direct,  # type: ignore[arg-type]
            io,
            plan,
            self,
        )
        self.updates = Updates(self.traffic, self.optimizer, lambda: self.told.append("step"))
        self.traffic.load_shards()
        self.traffic.pull(0, everything=True)
        self.updates.install()
        self.x, self.y = torch.randn(16, 6), torch.randint(0, 3, (16,))

    def leaving(self) -> tuple[int, int]:
        self.told.append("leaving")
        return 0, 0

    leaves_out = False

    def left_out(self, because: str) -> bool:
        self.told.append("left out")
        return self.leaves_out

    def counted(self) -> None:
        self.told.append("counted")

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(self.x), self.y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.model, self.optimizer)

    def train_plain(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.plain, self.plain_optimizer)

    def off_by(self) -> float:
        pairs = zip(self.model.parameters(), self.plain.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "NAdam", "Rprop"])
def test_one_worker_trains_as_torch_alone_with_any_optimizer(io: IoThread, kind: str) -> None:
    twin = Twin(io, kind)
    twin.train(8)
    twin.train_plain(8)
    assert twin.off_by() < 1e-6
    assert twin.told == ["leaving", "counted", "step"] * 8


MOMENTUM_ONLY, NORMALISED_ONLY, BOTH, NEITHER = (True, False), (False, True), (True, True), (False, False)
KEEPS = {
    "ASGD": NEITHER,  # a mean of parameters, which no step depends on
    "Adadelta": NORMALISED_ONLY,
    "Adafactor": NORMALISED_ONLY,
    "Adagrad": NORMALISED_ONLY,
    "Adam": BOTH,
    "AdamW": BOTH,
    "Adamax": BOTH,
    "LBFGS": NEITHER,  # it wants a closure, and joins no job
    "Muon": MOMENTUM_ONLY,  # what it makes of that is normalised without a memory
    "NAdam": BOTH,
    "RAdam": BOTH,
    "RMSprop": NORMALISED_ONLY,
    "Rprop": NORMALISED_ONLY,  # a step has a size of its own, whatever the gradient's
    "SGD": NEITHER,
    "SparseAdam": BOTH,
}


@pytest.mark.parametrize(
    "kind",
    [
        name
        for name, found in sorted(vars(torch.optim).items())
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
        if found is not torch.optim.Optimizer
    ],
)
def test_it_is_known_of_every_optimizer_of_torch_whether_it_has_momentum_and_whether_it_normalises(
    kind: str,
) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = getattr(torch.optim, kind)([parameter], lr=0.1)
    gradient = torch.full((4, 4), 0.1)
    parameter.grad = gradient.to_sparse() if kind == "SparseAdam" else gradient
    optimizer.step(*([lambda: parameter.sum()] if kind == "LBFGS" else []))
    assert (keeps(optimizer, MOMENTUM), keeps(optimizer, NORMALISED)) == KEEPS[kind]


@pytest.mark.parametrize(("kind", "kept"), [("SGD", MOMENTUM_ONLY), ("RMSprop", BOTH)])
def test_an_optimizer_has_momentum_where_it_was_asked_for(kind: str, kept: tuple[bool, bool]) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = getattr(torch.optim, kind)([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert (keeps(optimizer, MOMENTUM), keeps(optimizer, NORMALISED)) == kept


def test_adafactor_normalises_vectors_too() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()  # type: ignore[no-untyped-call]
    assert keeps(optimizer, NORMALISED)


def test_local_steps_leave_together_and_a_broken_off_round_leaves_when_it_is_flushed(io: IoThread) -> None:
    twin = Twin(io, local_steps=3)
    twin.train(2)
    assert not [told for told in twin.direct.told if told.startswith("commit")]
    twin.train(5)
    assert [told for told in twin.direct.told if told.startswith("commit")] == ["commit 0", "commit 1"]
    twin.updates.flush()
    assert twin.direct.told[-1] == "commit 2" and twin.traffic.clock == 3
    twin.train_plain(7)
    assert twin.off_by() < 1e-6
    assert twin.told.count("counted") == 3 and twin.told.count("step") == 7


def test_with_a_staleness_bound_a_step_counts_while_the_next_one_is_computed(io: IoThread) -> None:
    twin = Twin(io, staleness=1)
    before = [p.detach().clone() for p in twin.model.parameters()]
    twin.train(1)
    assert twin.told == ["leaving", "step"], "the exchange is in flight"
    assert all(torch.equal(a, b) for a, b in zip(before, twin.model.parameters(), strict=True))
    twin.train(1)
    assert twin.told[2:] == ["counted", "leaving", "step"]
    twin.updates.flush()
    assert twin.told.count("counted") == 2
    after = [p.detach().clone() for p in twin.model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_overlapped_steps_all_count_at_the_end(io: IoThread) -> None:
    """Two steps from the same parameters: SGD without momentum adds both gradients up."""
    twin = Twin(io, staleness=1)
    for group in twin.optimizer.param_groups:
        group["momentum"] = 0.0
    gradients = []
    before = [p.detach().clone() for p in twin.model.parameters()]
    for _ in range(2):
        twin.train(1)
        gradients.append([p.grad.clone() for p in twin.model.parameters() if p.grad is not None])
    twin.updates.flush()
    for start, now, first, second in zip(before, twin.model.parameters(), *gradients, strict=True):
        assert torch.allclose(now, start - 0.1 * first - 0.1 * second, atol=1e-6)


def test_outer_momentum_is_nesterov_on_the_shards(io: IoThread) -> None:
    twin = Twin(io, outer_momentum=0.5, outer_lr=0.7)
    for group in [*twin.optimizer.param_groups, *twin.plain_optimizer.param_groups]:
        group["momentum"] = 0.0
    twin.train(4)
    outer = torch.optim.SGD(twin.plain.parameters(), lr=0.7, momentum=0.5, nesterov=True)
    for _ in range(4):
        before = [p.detach().clone() for p in twin.plain.parameters()]
        twin.train_plain(1)
        for parameter, old in zip(twin.plain.parameters(), before, strict=True):
            parameter.grad = old - parameter.detach()
            parameter.data.copy_(old)
        outer.step()
    assert twin.off_by() < 1e-6


@pytest.mark.parametrize(
    "asked",
    [{}, {"compress": "topk:5%:fp32"}, {"compress": "topk:5%:fp32", "staleness": 1}],
    ids=str,
)
def test_a_parameter_of_half_width_does_not_send_what_rounding_took_from_it(
    io: IoThread, asked: dict[str, Any]
) -> None:
    twin = Twin(io, **asked)
    twin.model.to(torch.bfloat16)
    twin.traffic.replica.restore()
    for group in twin.optimizer.param_groups:
        group["lr"] = 0.0
    before = [twin.traffic.replica.held(chunk).clone() for chunk in range(len(twin.traffic.layout.chunks))]
    twin.x = twin.x.to(torch.bfloat16)
    twin.train(2)
    twin.updates.flush()
    for chunk, held in enumerate(before):
        assert torch.equal(twin.traffic.replica.held(chunk), held)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_model_that_is_converted_in_mid_training_goes_on(io: IoThread, staleness: int) -> None:
    twin = Twin(io, compress="topk:100%:fp32", staleness=staleness)
    twin.train(4)
    assert twin.updates.differences
    twin.model.to(torch.float64)
    twin.x = twin.x.double()
    for state in twin.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    twin.train(4)
    assert not twin.updates.differences
    twin.updates.finish()
    twin.plain.to(torch.float64)
    twin.train_plain(8)
    assert twin.off_by() < 2e-2


def test_an_update_that_is_not_finite_counts_nowhere_and_is_named(io: IoThread) -> None:
    twin = Twin(io)
    twin.x = twin.x * float("inf")
    with pytest.raises(ZmlError, match=r"the update of 0\.weight is not finite at step 0 of w0"):
        twin.train(1)
    io.call(nothing())
    assert not [told for told in twin.direct.told if told.startswith("commit")]


def test_an_exchange_that_failed_is_not_made_by_whoever_saves_in_spite_of_it(io: IoThread) -> None:
    twin = Twin(io, compress="topk:5%", staleness=1)
    twin.train(3)
    twin.updates.traffic.drain()
    committed = [told for told in twin.direct.told if told.startswith("commit")]
    with torch.no_grad():
        list(twin.model.parameters())[2][0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(ZmlError, match=r"the update of [02]\.weight is not finite"):
            twin.train(1)
    with pytest.raises(ZmlError, match="is not finite"):
        twin.updates.flush()
    assert [told for told in twin.direct.told if told.startswith("commit")] == committed


def test_a_thawed_parameter_is_refused(io: IoThread) -> None:
    twin = Twin(io, frozen=True)
    twin.model[0].weight.requires_grad_(True)
    with pytest.raises(ZmlError, match=r"0\.weight has a gradient"):
        twin.train(1)


def test_what_waits_in_the_residual_leaves_when_the_script_is_done(io: IoThread) -> None:
    twin = Twin(io, compress="topk:5%:fp32", warm_up_steps=0)
    twin.train(6)
    waiting = sum(float(residual.abs().sum()) for residual in twin.updates.residual.values())
    twin.updates.finish()
    left = sum(float(residual.abs().sum()) for residual in twin.updates.residual.values())
    assert waiting > 0.01 and left < 1e-3 * waiting, (waiting, left)
    for chunk in twin.traffic.layout.chunks:
        here = torch.empty(chunk.size)
        twin.traffic.binding.read(chunk.index, here)
        assert torch.equal(here, twin.traffic.replica.held(chunk.index)), "the model is what was published"
    momentum = twin.optimizer.state[twin.model[2].weight]["momentum_buffer"]
    assert not (momentum == 0).all(), "and what nothing follows needs no masking"


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_what_has_not_left_yet_acts_at_home_and_is_not_in_what_is_saved(io: IoThread, decay: float) -> None:
    twin = Twin(io, compress="topk:5%", warm_up_steps=0, residual_decay=decay)
    twin.train(3)
    chunk, residual = max(twin.updates.residual.items(), key=lambda pair: float(pair[1].abs().sum()))
    here = torch.empty(len(residual))
    twin.traffic.binding.read(chunk, here)
    published = twin.traffic.replica.held(chunk)
    assert float(residual.abs().sum()) > 0 and torch.equal(here, published - residual)
    twin.updates.flush()
    twin.traffic.binding.read(chunk, here)
    assert torch.equal(here, published)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"compress": "topk:5%"},
        {"compress": "topk:5%", "residual_decay": 0.9},
        {"compress": "topk:5%", "staleness": 1},
        {"compress": "topk:5%", "local_steps": 3},
        {"local_steps": 3},
    ],
    ids=str,
)
def test_who_looks_at_what_is_published_trains_on_as_if_nobody_had_looked(
    io: IoThread, asked: dict[str, Any]
) -> None:
    seen, unseen = (Twin(io, warm_up_steps=0, **asked) for _ in range(2))
    for _ in range(7):
        for twin in (seen, unseen):
            twin.train(1)
            if asked.get("staleness"):
                twin.traffic.drain()  # when something comes is up to the other thread
        before = parameters_of(seen)
        with seen.updates.published(), seen.updates.published():
            for chunk, values in enumerate(held(seen)):
                assert torch.equal(values, seen.traffic.replica.held(chunk))
        for own, parameter in zip(before, seen.model.parameters(), strict=True):
            assert torch.equal(own, parameter)
        for a, b in zip(parameters_of(seen), parameters_of(unseen), strict=True):
            assert torch.equal(a, b)
    for twin in (seen, unseen):
        twin.updates.finish()
    for a, b in zip(parameters_of(seen), parameters_of(unseen), strict=True):
        assert torch.equal(a, b)


def test_a_model_that_is_converted_while_it_is_looked_at_has_its_own_parameters_again(io: IoThread) -> None:
    twin = Twin(io, compress="topk:5%", warm_up_steps=0, frozen=True)
    twin.train(3)
    own = parameters_of(twin)
    with pytest.raises(KeyError), twin.updates.published():
        twin.model.double()
        raise KeyError("in the script")
    assert not twin.updates.shown
    for before, parameter in zip(own, parameters_of(twin), strict=True):
        assert torch.equal(before.double(), parameter)


def test_what_is_published_is_not_trained(io: IoThread) -> None:
    twin = Twin(io, compress="topk:5%", warm_up_steps=0)
    twin.train(3)
    own, (told, counted) = parameters_of(twin), (list(twin.told), twin.traffic.clock)
    updates = twin.updates
    wrongs: list[Callable[[], None]] = [partial(twin.train, 1), updates.flush, updates.finish, updates.depart]
    for wrong in wrongs:
        with pytest.raises(ZmlError, match=r"inside of zml\.published"), twin.updates.published():
            wrong()
    assert (twin.told, twin.traffic.clock) == (told, counted)
    assert all(torch.equal(a, b) for a, b in zip(own, parameters_of(twin), strict=True))
    twin.train(1)
    assert twin.traffic.clock == counted + 1


def gradients(twin: Twin) -> None:
    F.cross_entropy(twin.model(twin.x), twin.y).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("clips", [False, True])
def test_no_step_is_made_of_gradients_of_what_is_published(io: IoThread, clips: bool) -> None:
    twin = Twin(io, compress="topk:5%", warm_up_steps=0, frozen=True)
    twin.train(3)
    told, own = list(twin.told), parameters_of(twin)
    twin.optimizer.zero_grad()
    with twin.updates.published():
        gradients(twin)
    if clips:
        torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 0.1)
    with pytest.raises(ZmlError, match=r"computed inside of zml\.published"):
        twin.optimizer.step()
    assert twin.told == told
    assert all(torch.equal(a, b) for a, b in zip(own, parameters_of(twin), strict=True))
    twin.train(1)
    assert len(twin.told) > len(told) and not twin.updates.telling


@pytest.mark.parametrize("set_to_none", [True, False])
def test_who_looks_at_gradients_of_what_is_published_trains_on_as_ever(
    io: IoThread, set_to_none: bool
) -> None:
    looks, other = (Twin(io, compress="topk:5%", warm_up_steps=0) for _ in range(2))
    for _ in range(4):
        with looks.updates.published():
            gradients(looks)
        for twin in (looks, other):
            twin.optimizer.zero_grad(set_to_none=set_to_none)
            gradients(twin)
            twin.optimizer.step()
    for a, b in zip(parameters_of(looks), parameters_of(other), strict=True):
        assert torch.equal(a, b)
    with looks.updates.published(), torch.no_grad():
        looks.model(looks.x)
    assert not looks.updates.telling, "nothing is left behind on the parameters"


def test_the_momentum_of_just_what_has_left_begins_anew(io: IoThread) -> None:
    twin = Twin(io, compress="topk:10%", warm_up_steps=0)
    twin.train(2)
    left = {
        index: torch.zeros(p.numel(), dtype=torch.bool) for index, p in enumerate(twin.model.parameters())
    }
    for outbox in twin.traffic.outboxes.values():
        for chunk in outbox.bucket.chunks:
            sent = outbox.packer.sent(chunk)
            assert sent is not None
            for segment in twin.traffic.layout.chunks[chunk].segments:
                inside = sent[(sent >= segment.offset) & (sent < segment.offset + segment.size)]
                left[segment.parameter][inside - segment.offset + segment.start] = True
    for index, parameter in enumerate(twin.model.parameters()):
        momentum = twin.optimizer.state[parameter]["momentum_buffer"].view(-1)
        assert parameter.grad is not None
        moving = parameter.grad.view(-1) != 0
        assert torch.equal((momentum == 0) & moving, left[index] & moving)
        assert left[index].any() == (parameter.ndim > 1), "vectors go whole, and keep theirs"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"staleness": 1},
        {"local_steps": 3},
        {"residual_decay": 0.9},
        {"residual_decay": 0.9, "staleness": 1},
    ],
    ids=str,
)
def test_a_bucket_that_is_packed_where_its_gradients_live_trains_as_on_the_cpu(
    io: IoThread, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """With the packer for devices on the CPU; without decay the other one packs differences, and rounds elsewhere."""
    cpu = Twin(io, compress="topk:10%", warm_up_steps=0, **asked)
    monkeypatch.setattr(Binding, "device", lambda binding, parameters: "cpu:0")
    device = Twin(io, compress="topk:10%", warm_up_steps=0, **asked)
    packers = {type(outbox.packer) for outbox in device.traffic.outboxes.values()}
    assert packers == {DevicePacker} and not device.updates.differences
    close = torch.equal if "residual_decay" in asked else partial(torch.allclose, atol=1e-6)
    for _ in range(9):
        for twin in (cpu, device):
            twin.train(1)
        for one, other in zip(cpu.model.parameters(), device.model.parameters(), strict=True):
            assert close(one, other)
            momentum = [
                twin.optimizer.state[p]["momentum_buffer"] for twin, p in ((cpu, one), (device, other))
            ]
            assert close(*momentum), "what has left took its momentum along, here and there"
    for twin in (cpu, device):
        twin.updates.finish()
    for one, other in zip(cpu.model.parameters(), device.model.parameters(), strict=True):
        assert close(one, other)
    pairs = zip(device.model.parameters(), cpu.plain.parameters(), strict=True)
    assert not any(torch.equal(one, before) for one, before in pairs), "it was trained"


@pytest.mark.parametrize(
    "asked",
    [{}, {"staleness": 1}, {"staleness": 1, "local_steps": 3}, {"local_steps": 2}, {"residual_decay": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("pulled", [False, True])
def test_every_update_arrives_once_however_often_the_model_is_looked_at(
    io: IoThread, asked: dict[str, Any], pulled: bool
) -> None:
    twin = Twin(io, momentum=0.0, **{"compress": "topk:5%:fp32", "warm_up_steps": 0, **asked})
    assert twin.updates.differences
    began = [parameter.detach().clone() for parameter in twin.model.parameters()]
    moved = [torch.zeros_like(parameter) for parameter in began]
    for step in range(11):
        if step in (3, 4, 8):
            twin.updates.flush()
            if pulled:
                twin.traffic.pull(twin.traffic.clock)
            for chunk, values in enumerate(held(twin)):
                assert torch.equal(values, twin.traffic.replica.held(chunk))
        twin.train(1)
        for total, parameter in zip(moved, twin.model.parameters(), strict=True):
            assert parameter.grad is not None
            total += 0.1 * parameter.grad
    twin.updates.finish()
    for before, total, parameter in zip(began, moved, twin.model.parameters(), strict=True):
        off = (parameter.detach() - before + total).abs().max()
        assert off < (1e-5 if parameter.ndim > 1 else 1e-2 * total.abs().max())


def parameters_of(twin: Twin) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in twin.model.parameters()]


def held(twin: Twin) -> list[torch.Tensor]:
    """The model, chunk by chunk."""
    found = [torch.empty(chunk.size) for chunk in twin.traffic.layout.chunks]
    for chunk, values in enumerate(found):
        twin.traffic.binding.read(chunk, values)
    return found


def test_a_part_of_the_model_is_written_as_soon_as_its_parameters_are_here(
    io: IoThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Twin(io, compress="topk:5%:fp32", warm_up_steps=0)
    twin.train(1)
    order: list[str] = []
    whole, one = twin.traffic.replica.take, twin.traffic.landed

    def take(*args: Any) -> None:
        order.append("taken")
        whole(*args)

    def landed(bucket: int) -> None:
        one(bucket)
        order.append("written" if bucket not in twin.updates.unwritten else "left")

    monkeypatch.setattr(twin.traffic.replica, "take", take)
    monkeypatch.setattr(twin.traffic, "landed", landed)
    twin.train(1)
    assert order == ["taken", "written"] * len(twin.traffic.buckets) and len(twin.traffic.buckets) > 2


def test_parameters_that_come_whole_are_written_as_well(
    io: IoThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Twin(io, compress="topk:5%:fp32", warm_up_steps=0)
    twin.train(3)
    wanted = twin.traffic._wanted
    from_nothing = lambda some: [(bucket, [UNKNOWN] * len(have)) for bucket, have in wanted(some)]  # noqa: E731
    monkeypatch.setattr(twin.traffic, "_wanted", from_nothing)
    twin.train(1)
    for chunk, values in enumerate(held(twin)):
        lacks = twin.updates.residual[chunk]
        assert torch.allclose(values, twin.traffic.replica.held(chunk) - lacks, atol=1e-7)


@pytest.mark.parametrize("staleness", [0, 1])
def test_buckets_that_measure_in_different_ways_share_a_model(io: IoThread, staleness: int) -> None:
    twin = Twin(io, compress="topk:100%:fp32", staleness=staleness)
    twin.train(2)
    index = next(iter(twin.updates.differences))
    difference = twin.updates.differences.pop(index)
    twin.updates.less.update(difference.end())
    twin.train(4)
    twin.updates.finish()
    twin.train_plain(6)
    assert twin.off_by() < 2e-2


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"staleness": 1},
        {"staleness": 1, "local_steps": 3},
        {"staleness": None, "compress": "topk:20%:fp32"},
    ],
    ids=str,
)
def test_every_update_arrives_once_whenever_it_leaves(io: IoThread, asked: dict[str, Any]) -> None:
    twin = Twin(io, momentum=0.0, **{"compress": "topk:5%:fp32", "warm_up_steps": 0, **asked})
    began = [parameter.detach().clone() for parameter in twin.model.parameters()]
    moved = [torch.zeros_like(parameter) for parameter in began]
    for _ in range(7):
        twin.train(1)
        for total, parameter in zip(moved, twin.model.parameters(), strict=True):
            assert parameter.grad is not None
            total += 0.1 * parameter.grad  # plain SGD at this learning rate
    twin.updates.finish()
    for before, total, parameter in zip(began, moved, twin.model.parameters(), strict=True):
        off = (parameter.detach() - before + total).abs().max()
        assert off < (1e-5 if parameter.ndim > 1 else 1e-2 * total.abs().max()), (
            "vectors are rounded to 16 bits"
        )


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"compress": "topk:5%:fp32"},
        {"local_steps": 3},
        {"compress": "topk:5%:fp32", "staleness": None},
        {"compress": "topk:5%:fp32", "staleness": 1, "local_steps": 3},
    ],
    ids=str,
)
def test_a_worker_that_departs_sends_all_of_what_waits_and_waits_for_nothing(
    io: IoThread, asked: dict[str, Any]
) -> None:
    twin = Twin(io, momentum=0.0, **{"warm_up_steps": 0, **asked})
    began = {
        chunk.index: twin.traffic.replica.held(chunk.index).clone() for chunk in twin.traffic.layout.chunks
    }
    moved = [torch.zeros_like(parameter) for parameter in twin.model.parameters()]
    for _ in range(7):
        twin.train(1)
        for total, parameter in zip(moved, twin.model.parameters(), strict=True):
            assert parameter.grad is not None
            total += 0.1 * parameter.grad  # plain SGD at this learning rate
    assert twin.updates.owes == bool(asked)
    asked_before = list(twin.direct.asked)
    twin.updates.depart()
    assert not twin.updates.owes and not twin.traffic.due
    assert len(twin.direct.asked) <= len(asked_before) + bool(twin.traffic.plan.overlap), (
        "it asks for nothing"
    )
    assert [twin.told.count(word) for word in ("leaving", "counted")] == [twin.traffic.exchanges] * 2
    store = twin.direct.shard.store
    assert store is not None
    for chunk in twin.traffic.layout.chunks:
        if chunk.group == VECTORS:
            continue  # rounded to 16 bits on the way
        for segment in chunk.segments:
            there = store._held[chunk.index].w[segment.offset : segment.offset + segment.size]
            before = began[chunk.index][segment.offset : segment.offset + segment.size]
            total = moved[segment.parameter].view(-1)[segment.start : segment.start + segment.size]
            assert (there - before + total).abs().max() < 1e-5, "every update is at the shard, once"
    twin.updates.depart()
    twin.train(1)
    assert twin.told.count("leaving") == twin.traffic.exchanges, "and that was all that leaves"


def test_with_an_exchange_in_flight_what_it_carries_acts_at_home_too(io: IoThread) -> None:
    twin = Twin(io, compress="topk:5%:fp32", warm_up_steps=0, staleness=1)
    twin.train(4)
    assert twin.traffic.due
    here = {}
    for chunk in twin.traffic.layout.chunks:
        if chunk.group == VECTORS:
            continue  # rounded to 16 bits on the way
        here[chunk.index] = torch.empty(chunk.size)
        twin.traffic.binding.read(chunk.index, here[chunk.index])
        lacks = twin.traffic.replica.held(chunk.index) - here[chunk.index]
        residual = twin.updates.residual[chunk.index]
        assert float((lacks - residual).abs().max()) > 1e-4, "the last frame is on its way"
    twin.traffic.drain()
    for index, values in here.items():
        expected = twin.traffic.replica.held(index) - twin.updates.residual[index]
        assert torch.allclose(values, expected, atol=1e-6), "and this is what the model will be"


def test_with_an_exchange_in_flight_parameters_of_one_clock_more_are_asked_for(io: IoThread) -> None:
    for staleness, clocks in ((0, {1, 2, 3}), (1, {2, 3, 4})):
        twin = Twin(io, staleness=staleness)
        twin.direct.asked.clear()
        twin.train(3)
        twin.traffic.drain()
        assert set(twin.direct.asked) == clocks, "so that nobody computes beyond the bound with what is older"


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_step_without_a_finite_gradient_is_left_out_before_the_optimizer_takes_it_up(
    io: IoThread, kind: str
) -> None:
    left_out, undisturbed = (Twin(io, kind, local_steps=2) for _ in range(2))
    left_out.leaves_out = True
    for bad in (False, True, False, True, False, False):
        for twin in (left_out,) if bad else (left_out, undisturbed):
            twin.optimizer.zero_grad()
            loss = F.cross_entropy(twin.model(twin.x), twin.y)
            (loss * float("inf") if bad else loss).backward()  # type: ignore[no-untyped-call]
            twin.optimizer.step()
    assert left_out.told == ["step", "left out", "leaving", "counted", "step", "left out", "step", "leaving",
                             "counted", "step"]  # fmt: skip
    assert all(
        torch.equal(ours, others)
        for ours, others in zip(left_out.model.parameters(), undisturbed.model.parameters(), strict=True)
    )


def test_without_leave_to_skip_it_a_step_without_a_finite_gradient_stops_the_script(io: IoThread) -> None:
    twin = Twin(io)
    (F.cross_entropy(twin.model(twin.x), twin.y) * float("nan")).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ZmlError, match="is not finite"):
        twin.optimizer.step()
