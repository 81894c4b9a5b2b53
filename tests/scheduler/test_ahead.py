"""How many batches a worker takes ahead."""

import pytest

from zml.scheduler.ahead import ahead


@pytest.mark.parametrize(
    ("batch_s", "share", "batches"),
    [
        (None, 10_000, 0),
        (0.1, 10_000, 50),
        (0.3, 10_000, 17),
        (60.0, 10_000, 1),
        (0.1, 100, 25),
        (0.1, 3, 0),
        (1e-5, 10_000, 1024),
        (0.0, 10_000, 1024),
    ],
    ids=[
        "how fast it is is not known",
        "five seconds",
        "rounded up",
        "slow steps",
        "a quarter of its share",
        "a small share",
        "fast steps",
        "faster than the clock",
    ],
)
def test_a_worker_holds_batches_for_five_seconds_and_at_most_a_quarter_of_its_share(
    batch_s: float | None, share: int, batches: int
) -> None:
    assert ahead(batch_s, share) == batches
