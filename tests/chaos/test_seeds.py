"""Whole clusters from seeds, with whatever goes wrong in them; the rules are in `invariants`.

pytest tests/chaos                                          # the seeds that are always run
ZML_CHAOS_SEEDS=20000 pytest tests/chaos/test_seeds.py      # more of them; ZML_CHAOS_FIRST=500 begins there
python -m tests.chaos.world 4711                            # one of them again
"""

import gc
import os

import pytest

from .world import again, quiet, run

FIRST = int(os.environ.get("ZML_CHAOS_FIRST", "0"))
SEEDS = int(os.environ.get("ZML_CHAOS_SEEDS", "500"))
AT_ONCE = 25


@pytest.mark.slow
@pytest.mark.timeout(600)
# A process that dies between a call and its await leaves a coroutine behind.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <coroutine:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, AT_ONCE))
def test_nothing_is_lost_or_doubled_whatever_goes_wrong(first: int) -> None:
    gc.freeze()  # of what torch has brought, nothing will be garbage
    failed = []
    with quiet():
        for seed in range(first, min(first + AT_ONCE, FIRST + SEEDS)):
            outcome = run(seed)
            if outcome.broken is not None:
                failed.append(f"{outcome}\n  {again(seed)}\n  its messages are in {outcome.write()}")
    gc.collect()  # an error that nobody has seen is told when its task is collected
    assert not failed, "\n".join(failed)
