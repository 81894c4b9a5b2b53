"""Two pictures of simulated runs: how many jobs were done within which time, and how many machines there were.

matplotlib is not among zml's dependencies: it comes with the extra `bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import NO_MATPLOTLIB, USAGE, ZmlError
from .report import Outcome

A_PICTURE = "Name a .png, .svg or .pdf file."


def headless_pyplot() -> Any:
    """matplotlib's pyplot, on a canvas without a screen. Raises ZmlError where there is none."""
    try:
        import matplotlib
    except ImportError:
        raise ZmlError(
            NO_MATPLOTLIB, "--plot needs matplotlib, which is not here", "pip install 'zml-train[bench]'"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def must_be_picture(file: str) -> None:
    """Of a kind that matplotlib draws; what has no suffix becomes a .png. Raises ZmlError."""
    suffix = Path(file).suffix
    kinds = headless_pyplot().Figure().canvas.get_supported_filetypes()
    if suffix and suffix[1:].lower() not in kinds:
        raise ZmlError(USAGE, f"--plot {file}: {suffix} is no kind of picture", A_PICTURE)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    pyplot = headless_pyplot()
    figure, (done, fleet) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    try:
        for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
            own = [outcome for outcome in outcomes if outcome.policy == policy]
            times = sorted(
                job.ended - job.submitted for outcome in own for job in outcome.jobs if job.ended is not None
            )
            shares = [(i + 1) / len(times) for i in range(len(times))]
            (line,) = done.step(times, shares, where="post", label=policy)
            for i, outcome in enumerate(own):
                hours = [at / 3600 for at, _, _ in outcome.fleet]
                label = policy if i == 0 else None
                fleet.step(
                    hours,
                    [held for *_, held in outcome.fleet],
                    where="post",
                    color=line.get_color(),
                    label=label,
                    alpha=0.8,
                )
                fleet.step(
                    hours,
                    [count for _, count, _ in outcome.fleet],
                    where="post",
                    color=line.get_color(),
                    linestyle=":",
                    alpha=0.8,
                )
        done.set(xscale="log", xlabel="completion time, s", ylabel="share of jobs", ylim=(0, 1))
        fleet.set(xlabel="hours", ylabel="machines: held (line), there (dots)", ylim=(0, None))
        for axes in (done, fleet):
            axes.legend()
            axes.grid(alpha=0.3)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ZmlError(USAGE, f"the plot cannot be written to {path}: {error}", A_PICTURE) from None
    finally:
        pyplot.close(figure)
