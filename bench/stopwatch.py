"""Runs a script unchanged and writes down when each of its optimizer steps ended: stopwatch.py FILE SCRIPT [ARGS].

torch calls a global post hook after all hooks of an optimizer's own, so that what zml does within `opt.step()` lies
inside the interval. FILE gets JSON: a list of [seconds on the wall, CPU seconds of this process].
"""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

ends: list[tuple[float, float]] = []


def step_ended(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    ends.append((time.perf_counter(), time.process_time()))


def main() -> None:
    file, sys.argv = Path(sys.argv[1]).resolve(), sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    register_optimizer_step_post_hook(step_ended)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        file.write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
