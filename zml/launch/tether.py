"""A started process does not outlive its starter, however that one ends: prctl(2), PR_SET_PDEATHSIG.

The starter puts `environment()` into the child's environment, the child calls `hold()` first of all. The
kernel then kills it when the *thread* that started it is gone: start processes from main threads only.
"""

import ctypes
import os
import signal
from collections.abc import MutableMapping

VARIABLE = "ZML_PARENT"
PR_SET_PDEATHSIG = 1
ORPHANED = 137  # as if the kernel had already killed it


def environment() -> dict[str, str]:
    return {VARIABLE: str(os.getpid())}


def hold(environ: MutableMapping[str, str] | None = None) -> None:
    """Die with the parent that asked for it, if one did. The variable is forgotten: it is not for children."""
    environ = os.environ if environ is None else environ
    parent = environ.pop(VARIABLE, "")
    if not parent.isdigit():
        return
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:  # Linux
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it went before we could ask
        os._exit(ORPHANED)
