"""zml trains PyTorch models on machines that come and go: three changed lines, one executable, three roles.

    train = zml.join(model, opt, train)
    for epoch in zml.epochs(10):
        for x, y in train:
            ...
            opt.step()
            zml.log(loss=loss)
    zml.save("model.safetensors")

With no zml around it (`python train.py`) `join` returns the loader as it was, `epochs(n)` is `range(n)`, `log` prints
every few seconds and `save` writes plain safetensors. Importing this package imports neither torch nor zmq.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["__version__", "epochs", "evaluate", "join", "log", "published", "save"]
__version__ = "0.1.0"

Loader = TypeVar("Loader")


def join(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader | None = None,
    *,
    data: str = "exact",
    batches: int | None = None,
) -> Loader:
    """Make this script a worker; returns the loader, which from now on yields this worker's share.

    The model is not wrapped and `optimizer.step` is not replaced: gradients leave and parameters arrive through
    public hooks. Call it once, after model, optimizer and loader exist and before the first step.

    A loader over an IterableDataset is divided exactly where the data set has `state_dict()` and
    `load_state_dict(state)` (`zml.worker.exact_streams`); an epoch is `batches` of its batches. `data="best effort"`
    takes one that has not: each worker reads its own part (`zml.worker.streams`). Alone neither changes anything.
    Raises `zml.errors.ZmlError` for what cannot be trained this way, with the fix.
    """
    from .errors import LOADER, ZmlError
    from .worker.script import BEST_EFFORT, EXACT, current

    if data not in (EXACT, BEST_EFFORT):
        raise ZmlError(LOADER, f"zml.join got data={data!r}", f"Choose one of: {EXACT}, {BEST_EFFORT}.")
    return current().join(model, optimizer, loader, data, batches)  # type: ignore[no-any-return]


def epochs(count: int) -> Iterator[int]:
    """`range(count)`, from the epoch that the job is in: a worker that comes late starts there."""
    from .worker.script import current

    return current().epochs(count)


def evaluate(fn: Callable[[Any], Mapping[str, Any]], loader: Any) -> dict[str, float]:
    """The sums over a whole DataLoader of what `fn(batch)` returns, a dict of floats or one-element tensors.

    In a cluster the batches are divided over the workers, each is evaluated exactly once, and every worker gets the
    same totals, exact to the last bit. After an epoch all workers hold the same parameters; call it there, on each.
    """
    from .worker.script import current

    return current().evaluate(fn, loader)


def log(**values: Any) -> None:
    """Report numbers (floats or one-element tensors) of this step. Cheap: they are averaged and sent twice a second."""
    from .worker.script import current

    current().log(values)


def published() -> AbstractContextManager[None]:
    """`with zml.published(): validate(model)` looks at the model of the whole job in the middle of an epoch.

    Where the optimizer runs on the workers, each worker's own model also has what has not left it yet, and validates
    worse than what all of them hold. Inside, the model holds the latter, as this worker knows it; afterwards its
    parameters are what they were, to the bit (what a forward pass changes in buffers stays). No other worker takes
    part. Only look at the model inside, and differentiate no graph of before afterwards: where the optimizer runs on
    the workers, a step inside, or with gradients from inside alone, raises `zml.errors.ZmlError`; elsewhere it is a
    step like any other.
    """
    from .worker.script import current

    return current().published()


def save(path: str | PathLike[str]) -> None:
    """Write the model's state as safetensors, whole or not at all; in a cluster one worker does, the others return."""
    from .worker.script import current

    current().save(path)
