"""Who may import whom, read from the source itself: the layering of the design is a fact, not a habit.

`scheduler` decides and sees no clock and no socket; `transport` moves messages and knows nothing of jobs or
gradients; `zml` composes both; what computes does not talk, and what coordinates does not load torch.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"zml": ROOT / "zml", "zml.transport": ROOT / "transport", "zml.scheduler": ROOT / "scheduler"}
STANDARD = frozenset(sys.stdlib_module_names)

NOT_IN_SCHEDULER = {
    "asyncio",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
}
THIRD_PARTY_IN_TRANSPORT = {"lz4", "msgpack", "msgspec", "structlog", "uvloop", "zmq"}
MAY_IMPORT_ZMQ = {"zml.transport.endpoint", "zml.transport.auth"}
COMPUTES = {
    "zml.compression",
    "zml.hyper",
    "zml.layout",
    "zml.noise",
    "zml.pages",
    "zml.plan",
    "zml.proc",
    "zml.rates",
    "zml.stragglers",
    "zml.shard.fused",
    "zml.shard.optim",
    "zml.shard.store",
    "zml.worker.auto",
    "zml.worker.binding",
    "zml.worker.optimizer_state",
    "zml.worker.outbox",
    "zml.worker.replica",
    "zml.worker.schedules",
    "zml.worker.timeline",
}  # and zml.checkpoint.*, zml.codec.*
TALKS = ("asyncio", "uvloop", "zmq", "zml.transport")
COORDINATES = {
    "zml",
    "zml.__main__",
    "zml.compression",
    "zml.config",
    "zml.errors",
    "zml.address",
    "zml.figures",
    "zml.files",
    "zml.gpu",
    "zml.hold",
    "zml.intervals",
    "zml.journal",
    "zml.lease",
    "zml.link",
    "zml.messages",
    "zml.noise",
    "zml.observe",
    "zml.own",
    "zml.piecewise",
    "zml.plan",
    "zml.proc",
    "zml.rates",
    "zml.records",
    "zml.stack",
    "zml.status",
    "zml.stragglers",
    "zml.worker",
    "zml.agent.runner",
    "zml.worker.script",
}  # and what `coordinating` adds: whole packages
BANNED_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
BANNED_CALLS = {"eval", "exec", "__import__"}
BANNED_ATTRIBUTES = {("torch", "load"), ("torch", "save")}
BANNED_METHODS = {"recv_pyobj", "send_pyobj"}


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module


class Import(NamedTuple):
    """`at_start`: it runs when the module is imported, not only when a function is called."""

    module: str
    line: int
    at_start: bool


@cache
def modules() -> dict[str, Module]:
    found: dict[str, Module] = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if package == "zml" and any(part.is_symlink() for part in path.parents):
                continue  # the links to the other two packages, which are walked under their own names
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return found


@cache
def imports(module: Module) -> tuple[Import, ...]:
    """Everything the module imports, relative names resolved; `from a import b` counts as `a` and `a.b`."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]

    def walk(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                source = ".".join([*above, source] if source else above)
            yield Import(source, node.lineno, at_start)
            for alias in node.names:
                yield Import(f"{source}.{alias.name}", node.lineno, at_start)
        inside = at_start and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return tuple(walk(module.tree, True))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def where(module: Module, line: int) -> str:
    return f"{module.path.relative_to(ROOT)}:{line}"


def coordinating() -> list[str]:
    packages = (
        "zml.agent",
        "zml.checkpoint",
        "zml.cluster",
        "zml.commands",
        "zml.coordinator",
        "zml.dashboard",
        "zml.doctor",
        "zml.launch",
        "zml.logs",
        "zml.metrics",
        "zml.obs",
        "zml.runs",
        "zml.simulate",
        "zml.slurm",
        "zml.text",
        "zml.top",
        "zml.tracing",
        "zml.trackers",
        "zml.web",
    )
    return sorted(n for n in modules() if n in COORDINATES or any(within(n, package) for package in packages))


def computing() -> list[str]:
    packages = ("zml.checkpoint", "zml.codec")
    return sorted(n for n in modules() if n in COMPUTES or any(within(n, package) for package in packages))


def test_the_walk_sees_the_packages() -> None:
    assert {"zml", "zml.errors", "zml.messages"} <= modules().keys()
    assert [
        i.module for i in imports(modules()["zml.worker.script"]) if i.at_start and within(i.module, "zml")
    ]


def test_scheduler_imports_only_the_standard_library_and_neither_clock_nor_io() -> None:
    wrong = []
    for module in modules().values():
        if not within(module.name, "zml.scheduler"):
            continue
        for found in imports(module):
            top = found.module.partition(".")[0]
            own = within(found.module, "zml.scheduler")
            if not own and (top not in STANDARD or top in NOT_IN_SCHEDULER):
                wrong.append(f"{where(module, found.line)} imports {found.module}")
    assert wrong == []


def test_transport_knows_neither_zml_nor_scheduler_nor_torch() -> None:
    wrong = []
    for module in modules().values():
        if not within(module.name, "zml.transport"):
            continue
        for found in imports(module):
            top = found.module.partition(".")[0]
            own = within(found.module, "zml.transport")
            if not own and top not in STANDARD and top not in THIRD_PARTY_IN_TRANSPORT:
                wrong.append(f"{where(module, found.line)} imports {found.module}")
    assert wrong == []


def test_only_the_endpoint_speaks_zeromq() -> None:
    wrong = [
        f"{where(module, found.line)} imports {found.module}"
        for module in modules().values()
        for found in imports(module)
        if within(found.module, "zmq") and module.name not in MAY_IMPORT_ZMQ
    ]
    assert wrong == []


def test_opentelemetry_is_loaded_by_one_module_and_that_one_when_it_is_needed() -> None:
    wrong = [
        f"{where(module, found.line)} imports {found.module}"
        for module in modules().values()
        for found in imports(module)
        if (within(found.module, "opentelemetry") and module.name != "zml.tracing.otlp")
        or (found.module == "zml.tracing.otlp" and found.at_start)
    ]
    assert wrong == []


def test_what_computes_does_not_talk() -> None:
    wrong = [
        f"{where(modules()[name], found.line)} imports {found.module}"
        for name in computing()
        for found in imports(modules()[name])
        if any(within(found.module, talker) for talker in TALKS)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", coordinating())
def test_what_coordinates_does_not_load_torch(name: str) -> None:
    """Not even through another module of zml that it imports when it is imported itself."""
    seen: dict[str, str] = {name: name}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for found in imports(modules()[current]):
            if not found.at_start:
                continue
            assert not within(found.module, "torch"), f"{seen[current]} -> torch"
            if found.module in modules() and found.module not in seen:
                seen[found.module] = f"{seen[current]} -> {found.module}"
                waiting.append(found.module)


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("agent", ("coordinator", "worker", "shard", "commands")),
        ("worker", ("coordinator", "shard", "commands")),
        ("shard", ("coordinator", "worker", "agent", "commands")),
        ("coordinator", ("worker", "agent", "commands")),
        ("runs", ("coordinator", "worker", "agent", "shard", "commands")),
        ("text", ("coordinator", "worker", "agent", "shard", "commands")),
    ],
)
def test_a_role_knows_others_by_their_messages_only(room: str, others: tuple[str, ...]) -> None:
    wrong = {
        f"{where(module, found.line)} imports {found.module}"
        for module in modules().values()
        if within(module.name, f"zml.{room}")
        for found in imports(module)
        for other in others
        if within(found.module, f"zml.{other}")
    }
    assert wrong == set()


def test_nothing_can_be_made_to_run_code_from_bytes() -> None:
    """No pickle and no eval on wire or disk; torch.load and torch.save are pickle too."""
    wrong = []
    for module in modules().values():
        for found in imports(module):
            if found.module.partition(".")[0] in BANNED_MODULES:
                wrong.append(f"{where(module, found.line)} imports {found.module}")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name) and called.id in BANNED_CALLS:
                wrong.append(f"{where(module, node.lineno)} calls {called.id}")
            if isinstance(called, ast.Attribute):
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                if (owner, called.attr) in BANNED_ATTRIBUTES or called.attr in BANNED_METHODS:
                    wrong.append(f"{where(module, node.lineno)} calls {ast.unparse(called)}")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    wrong.append(f"{where(module, node.lineno)} allows pickle")
    assert wrong == []


def test_every_exported_name_exists() -> None:
    wrong = []
    for module in modules().values():
        defined: set[str] = set()
        exported: list[str] = []
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                defined.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        defined.add(target.id)
                        if target.id == "__all__":
                            exported = list(ast.literal_eval(node.value))
        wrong += [f"{module.name} exports {name}" for name in exported if name not in defined]
    assert wrong == []


def test_no_module_hides_a_name_that_its_package_exports() -> None:
    """Importing `zml.log` would replace the function `zml.log` by the module."""
    wrong = []
    for module in modules().values():
        for node in module.tree.body if module.path.name == "__init__.py" else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
                wrong += [f"{module.name}.{name}" for name in names if f"{module.name}.{name}" in modules()]
    assert wrong == []


def test_no_module_is_longer_than_one_sitting() -> None:
    """But for the one file that declares every message: a list, and not read in one go."""
    long = {m.name: n for m in modules().values() if (n := m.path.read_text().count("\n")) > 600}
    assert long.pop("zml.messages", 0) < 1200
    assert long == {}
