"""Of whatever process has this folder on its path: Python runs this before all else.

The first optimizer of a process loads torch's compiler, only to be kept from it. That takes as long as all of torch, in
each script of each cluster. No script of a test compiles anything: these have the two names that optimizers use.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class NoCompiler(MetaPathFinder, Loader):
    """Anything else that is asked of it is an AttributeError."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "torch._dynamo" else None

    def exec_module(self, module: ModuleType) -> None:
        module.disable = disable  # type: ignore[attr-defined]
        module.graph_break = lambda: None  # type: ignore[attr-defined]


def disable(function: Any, recursive: bool = True, *, wrapping: bool = True) -> Any:
    return function


sys.meta_path.insert(0, NoCompiler())
