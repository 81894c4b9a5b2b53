"""The sparse codec's loops, compiled by numba: once on a machine, then loaded.

The rule: nothing is compiled inside a training step. `prepare` compiles or loads a module's kernels; it is called when
a codec or a store is made. Processes that start together wait for the first one's result.
"""

import fcntl
import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ENTRY = "zml.codec.kernels.pack"
_HERE = Path(__file__).parent
DELTAS = "zml.codec.deltas"
ON_SHARDS = ("zml.codec.sums", DELTAS, "zml.shard.fused")  # more of them, called there
ON_DEVICES = ("zml.codec.device",)
_loaded: dict[str, ModuleType] = {}
NOTICE = "compiling the codec's kernels, once on this machine"


def prepare(say: Callable[[str], None] | None = None, module: str = ENTRY) -> ModuleType:
    """The module with compiled kernels. `say` hears of it if they must be compiled, which takes a while."""
    if (loaded := _loaded.get(module)) is not None:
        return loaded
    import numba
    from numba.core import event

    folder = _folder(numba.__version__)
    with _alone(folder / "lock"), _notice(event, say):
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)
        try:
            _loaded[module] = importlib.import_module(module)
            return _loaded[module]
        finally:
            numba.config.CACHE_DIR = before


def _folder(numba_version: str) -> Path:
    """Where what is compiled from these very sources is kept: beside them, or with the user's caches.

    numba looks at the file of a kernel only, not at those of the functions it calls: hence the digest of all.
    """
    digest = hashlib.blake2b(numba_version.encode(), digest_size=8)
    for source in sorted(_HERE.glob("*.py")):
        digest.update(source.read_bytes())
    own = os.environ.get("NUMBA_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    places = [Path(own)] if own else [_HERE / "__pycache__", Path(cache).expanduser() / "zml"]
    for place in places:
        folder = place / f"kernels-{digest.hexdigest()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="zml-kernels-"))  # compiled again by every process, but compiled


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, also when this process dies
        yield


@contextmanager
def _notice(event: Any, say: Callable[[str], None] | None) -> Iterator[None]:
    """Say once that something is compiled, when the first function is."""

    class Listener(event.Listener):
        said = False

        def on_start(self, _event: Any) -> None:
            if not self.said and say is not None:
                self.said = True
                say(NOTICE)

        def on_end(self, _event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield
