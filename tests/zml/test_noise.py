"""The noise scale of gradients whose distribution is known."""

import math

import pytest
import torch

from zml.noise import LEAST, NOTHING, WINDOW, Estimate, Norms, estimate, scale, smoothed, together


def norms(gradients: torch.Tensor) -> Norms:
    """Of one update: a row for each worker."""
    return Norms(float(gradients.square().sum(1).mean()), float(gradients.mean(0).square().sum()))


@pytest.mark.parametrize("workers", [2, 4, 16])
@pytest.mark.parametrize("wanted", [8.0, 200.0, 5000.0])
def test_the_noise_scale_of_gaussian_gradients_is_found(workers: int, wanted: float) -> None:
    """Samples' gradients are G + N(0, I sigma^2), so that tr(Sigma) / |G|^2 is known; a worker's is the mean of 32."""
    seed, batch, size = 3, 32, 4_000
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)
    true = torch.randn(size, generator=random)
    sigma = math.sqrt(wanted * float(true.square().sum()) / size)
    found = NOTHING
    for _ in range(WINDOW):
        noise = torch.randn((workers, size), generator=random) * (sigma / math.sqrt(batch))
        found = smoothed(found, workers, norms(true + noise))
    assert found.updates == WINDOW
    measured = scale(found, batch)
    assert measured is not None and measured == pytest.approx(wanted, rel=0.25)
    assert found.variance * batch == pytest.approx(sigma**2 * size, rel=0.05)


def test_one_update_by_hand() -> None:
    """Two workers, (3, 0) and (1, 0): each 5, mean 4; so |G|^2 = 2 * 4 - 5 and tr(Sigma) / b = 2 * (5 - 4)."""
    assert norms(torch.tensor([[3.0, 0.0], [1.0, 0.0]])) == Norms(5.0, 4.0)
    assert estimate(2, Norms(5.0, 4.0)) == (3.0, 2.0)


def test_what_shards_find_for_their_parts_adds_up() -> None:
    random = torch.Generator().manual_seed(1)
    whole, parts = NOTHING, [NOTHING, NOTHING]
    for _ in range(2 * WINDOW):
        gradients = torch.randn((3, 50), generator=random) + 1
        whole = smoothed(whole, 3, norms(gradients))
        cut = (gradients[:, :20], gradients[:, 20:])
        parts = [smoothed(part, 3, norms(values)) for part, values in zip(parts, cut, strict=True)]
    found = together(parts)
    assert found.updates == whole.updates
    assert found.square == pytest.approx(whole.square) and found.variance == pytest.approx(whole.variance)


def test_nothing_is_invented() -> None:
    assert smoothed(NOTHING, 1, Norms(1.0, 1.0)) == NOTHING, "one worker: nothing to compare"
    assert smoothed(NOTHING, 2, Norms(math.inf, 1.0)) == NOTHING
    assert together([]) == NOTHING
    assert together([Estimate(9, 1.0, 1.0), NOTHING]) == NOTHING, "one shard has measured nothing yet"
    enough = Estimate(LEAST, 2.0, 3.0)
    assert scale(enough, 10) == 15.0
    assert scale(enough, 0) is None, "the batch size is not known"
    assert scale(enough._replace(updates=LEAST - 1), 10) is None
    assert scale(enough._replace(square=-1.0), 10) is None, "the mean drowns in noise"


def test_old_updates_are_forgotten() -> None:
    found = NOTHING
    for _ in range(WINDOW):
        found = smoothed(found, 2, Norms(5.0, 4.0))
    for _ in range(10 * WINDOW):
        found = smoothed(found, 2, Norms(50.0, 40.0))
    assert found.square == pytest.approx(30.0, rel=1e-3)
