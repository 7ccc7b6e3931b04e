"""The direction of dependencies, and what each room may touch, read from the syntax trees of `src`.

Each rule is a function from one parsed module to complaints. Every rule is shown a snippet that breaks it, so that a rule
that can no longer fail fails here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import valohai_fuse

PACKAGE = Path(valohai_fuse.__file__).resolve().parent
LINES_MAX = 500

# Who may import whom, by room. A room is a top-level module or folder of the package. `errors` and `ports` are below all.
PURE = {"errors"}
ADAPTER = {"ports", "model", "errors", "settings"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "model": PURE,
    "ports": {"model", "errors"},
    "settings": {"errors"},
    "handshake": {"errors", "settings"},
    "engine": {"ports", "model", "errors", "settings"},
    "mount": {"engine", "ports", "model", "errors", "settings"},
    "store": ADAPTER,
    "allocator": set(),
    "descriptors": set(),
    "fetch": ADAPTER | {"allocator", "descriptors"},
    "sources": ADAPTER,
    "obs": ADAPTER,
    "sandbox": {"model", "errors", "settings"},
    "supervisor": {"handshake", "mount", "obs", "errors", "settings"},
    "occupancy": {"model"},
    "inspection": {
        "handshake",
        "occupancy",
        "sources",
        "engine",
        "store",
        "obs",
        "ports",
        "model",
        "errors",
        "settings",
    },
}
MAY_IMPORT["warming"] = {"engine", "obs", "model", "errors"}
MAY_IMPORT["assembly"] = {"inspection", "fetch", *MAY_IMPORT["inspection"]}
MAY_IMPORT["downloading"] = {"assembly", *MAY_IMPORT["assembly"]}
MAY_IMPORT["daemon"] = {
    "mount",
    "warming",
    "occupancy",
    "assembly",
    "allocator",
    "descriptors",
    *MAY_IMPORT["assembly"],
}
MAY_IMPORT["cli"] = {*MAY_IMPORT["daemon"], "daemon", "downloading", "supervisor", "sandbox"}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["__init__"] = set()

EXCEPTIONS = {("fetch.worker", "store.landing")}
"""A worker lands what it receives; the bytes must not pass through the daemon."""

VAGUE = ("util", "utils", "helper", "helpers", "manager", "common", "misc")
FOREIGN = {  # a library: the rooms that may import it
    "pyfuse3": {"mount"},
    "click": {"cli"},
    "rich": {"cli"},
    "httpx": {"sources"},
    "pycurl": {"fetch"},
}


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the package: `name` without the package, such as `engine.reader`."""

    name: str
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        """The first component of the name."""
        return self.name.split(".")[0]


Rule = Callable[[Module], Iterator[str]]


def parse(name: str, source: str) -> Module:
    """`source` as the module `name`."""
    return Module(name, ast.parse(source), source.count("\n"))


def all_modules() -> list[Module]:
    """Every module of the package, read from its source."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found.append(parse(name, path.read_text(encoding="utf-8")))
    return found


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that the module imports, at any depth; relative imports are resolved."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["valohai_fuse", *module.name.split(".")[: -node.level], base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imports_point_downwards(module: Module) -> Iterator[str]:
    """cli -> daemon, supervisor -> {mount, engine, store, fetch, sources, obs}; adapters do not know one another."""
    if module.room not in MAY_IMPORT:
        yield f"1: the room {module.room} has no place in the architecture"
        return
    for line, name in imported(module):
        package, _, inner = name.partition(".")
        if package != "valohai_fuse" or not inner:
            continue
        room = inner.split(".")[0]
        if room in {"__version__", module.room} or room in MAY_IMPORT[module.room]:
            continue
        if not any(module.name == user and inner.startswith(used) for user, used in EXCEPTIONS):
            yield f"{line}: {module.room} must not import {room}"


def libraries_stay_in_their_room(module: Module) -> Iterator[str]:
    """pyfuse3 is mount's, click and rich are cli's, httpx is sources', pycurl is fetch's; model knows no trio."""
    for line, name in imported(module):
        library = name.split(".")[0]
        if module.room not in FOREIGN.get(library, {module.room}):
            yield f"{line}: only {', '.join(sorted(FOREIGN[library]))} may import {library}"
        if module.room == "model" and library in {"trio", "socket", "threading", "asyncio", "subprocess"}:
            yield f"{line}: model is pure, it must not import {library}"
        if module.room == "engine" and library in {"threading", "socket", "subprocess", "asyncio"}:
            yield f"{line}: engine lives in trio alone, it must not import {library}"


def only_cli_prints(module: Module) -> Iterator[str]:
    """`print` and writing to sys.stdout belong to cli; the sandbox's own process announces itself on stdout."""
    if module.room == "cli":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: only cli prints"


def only_settings_reads_the_environment(module: Module) -> Iterator[str]:
    """`os.environ` and `os.getenv` are read in settings.py alone."""
    if module.name == "settings":
        return
    for node in ast.walk(module.tree):
        names = (
            {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) and node.module == "os" else set()
        )
        attribute = node.attr if isinstance(node, ast.Attribute) and _dotted(node.value) == "os" else ""
        if {attribute, *names} & {"environ", "environb", "getenv", "getenvb", "putenv"}:
            yield f"{getattr(node, 'lineno', 1)}: only settings.py reads the environment"


def pure_rooms_are_given_the_time(module: Module) -> Iterator[str]:
    """model and engine are given a clock: no `time.time`, no `datetime.now`; model has no monotonic clock either."""
    if module.room not in {"model", "engine"}:
        return
    clocks = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now", "date.today"}
    if module.room == "model":
        clocks |= {"time.monotonic", "time.monotonic_ns", "time.perf_counter"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and _dotted(node) in clocks:
            yield f"{node.lineno}: {module.room} is given the time, it does not look: {_dotted(node)}"
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield f"{node.lineno}: write time.{node.names[0].name}, so that this rule can see it"


def fuse_errors_stay_in_mount(module: Module) -> Iterator[str]:
    """Errno constants are looked at for what the kernel told us (`error.errno == errno.X`); replies to it are mount's."""
    if module.room == "mount":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and "FUSEError" in {
            getattr(node, "id", ""),
            getattr(node, "attr", ""),
        }:
            yield f"{node.lineno}: FUSEError is raised and caught in mount alone"


def asserts_have_no_effect(module: Module) -> Iterator[str]:
    """`python -O` removes assertions: nothing may be awaited, assigned or changed in one."""
    changing = {
        "add",
        "append",
        "pop",
        "remove",
        "discard",
        "clear",
        "update",
        "write",
        "close",
        "send",
        "read",
        "put",
        "get_nowait",
    }
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Assert):
            continue
        for inner in ast.walk(node.test):
            called = inner.func.attr if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) else ""
            if isinstance(inner, (ast.Await, ast.NamedExpr, ast.Yield)) or called in changing:
                yield f"{node.lineno}: this assertion does something"


def modules_are_one_thought(module: Module) -> Iterator[str]:
    """No module over 500 lines, none that cannot say in a docstring what it is for."""
    if module.lines > LINES_MAX:
        yield f"1: {module.lines} lines"
    if not ast.get_docstring(module.tree) and not module.name.endswith("__init__") and module.tree.body:
        yield "1: no module docstring"


def names_say_something(module: Module) -> Iterator[str]:
    """Nothing is called utils, helper, manager or common."""
    if any(part in VAGUE for part in module.name.split(".")):
        yield f"1: the module name {module.name} says nothing"
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = node.name.lower()
            if name in VAGUE or name.endswith(("manager", "helper", "utils")):
                yield f"{node.lineno}: the name {node.name} says nothing"


def public_things_say_their_contract(module: Module) -> Iterator[str]:
    """Every public class, function and method has a docstring."""
    for node in _public_definitions(module.tree):
        if not ast.get_docstring(node):
            yield f"{node.lineno}: {node.name} has no docstring"


RULES: list[Rule] = [
    imports_point_downwards,
    libraries_stay_in_their_room,
    only_cli_prints,
    only_settings_reads_the_environment,
    pure_rooms_are_given_the_time,
    fuse_errors_stay_in_mount,
    asserts_have_no_effect,
    modules_are_one_thought,
    names_say_something,
    public_things_say_their_contract,
]

BREAKS: list[tuple[Rule, str, str]] = [
    (imports_point_downwards, "engine.x", "from valohai_fuse.mount import errnos"),
    (imports_point_downwards, "store.x", "import valohai_fuse.fetch.pool"),
    (imports_point_downwards, "store.x", "def f():\n    from valohai_fuse import fetch"),
    (imports_point_downwards, "store.x", "from ..fetch import pool"),
    (imports_point_downwards, "model.x", "from valohai_fuse.ports import Lease"),
    (imports_point_downwards, "ports", "from valohai_fuse.engine import leases"),
    (imports_point_downwards, "fetch.pool", "from valohai_fuse.store.landing import land"),
    (imports_point_downwards, "attic.x", "pass"),
    (libraries_stay_in_their_room, "engine.x", "import pyfuse3"),
    (libraries_stay_in_their_room, "daemon", "from rich.console import Console"),
    (libraries_stay_in_their_room, "fetch.x", "import httpx"),
    (libraries_stay_in_their_room, "model.x", "import trio"),
    (libraries_stay_in_their_room, "engine.x", "from threading import Lock"),
    (only_cli_prints, "daemon", "print('ready')"),
    (only_settings_reads_the_environment, "cli.x", "import os\nos.environ['HOME']"),
    (only_settings_reads_the_environment, "cli.x", "import os\nos.getenv('HOME')"),
    (only_settings_reads_the_environment, "cli.x", "from os import environ"),
    (pure_rooms_are_given_the_time, "engine.x", "import time\nnow = time.time()"),
    (pure_rooms_are_given_the_time, "engine.x", "import time\nclock = time.time"),
    (pure_rooms_are_given_the_time, "model.x", "from datetime import datetime\nnow = datetime.now()"),
    (pure_rooms_are_given_the_time, "model.x", "from time import time"),
    (fuse_errors_stay_in_mount, "engine.x", "def f(pyfuse3):\n    raise pyfuse3.FUSEError(5)"),
    (asserts_have_no_effect, "engine.x", "assert queue.pop() == 1"),
    (asserts_have_no_effect, "engine.x", "async def f():\n    assert await g()"),
    (modules_are_one_thought, "engine.x", '"""Long."""\n' + "x = 1\n" * LINES_MAX),
    (modules_are_one_thought, "engine.x", "x = 1"),
    (names_say_something, "engine.utils", ""),
    (names_say_something, "engine.x", "class LeaseManager: pass"),
    (public_things_say_their_contract, "engine.x", "def fetch(): pass"),
    (public_things_say_their_contract, "engine.x", "class Reader:\n    'Doc.'\n    async def read(self): pass"),
]

KEEPS: list[tuple[Rule, str, str]] = [
    (imports_point_downwards, "fetch.worker", "from valohai_fuse.store.landing import land"),
    (
        imports_point_downwards,
        "engine.x",
        "from valohai_fuse.model import extents\nfrom valohai_fuse.ports import Lease",
    ),
    (imports_point_downwards, "cli.main", "from valohai_fuse import __version__"),
    (libraries_stay_in_their_room, "engine.x", "import trio"),
    (only_cli_prints, "cli.main", "print('ready')"),
    (only_settings_reads_the_environment, "settings", "import os\nos.environ"),
    (only_settings_reads_the_environment, "cli.x", "def f(environ): return environ['HOME']"),
    (pure_rooms_are_given_the_time, "daemon", "import time\ntime.time()"),
    (asserts_have_no_effect, "engine.x", "assert start <= stop and len(found) == 1"),
    (public_things_say_their_contract, "engine.x", "def _inner(): pass\ndef f():\n    'Doc.'\n    def g(): pass"),
]


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _public_definitions(
    node: ast.Module | ast.ClassDef,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            if not any(_dotted(decorator).endswith(("overload", ".setter")) for decorator in child.decorator_list):
                yield child
            if isinstance(child, ast.ClassDef):
                yield from _public_definitions(child)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    """Every module of the package keeps every rule."""
    modules = all_modules()
    assert len(modules) > 10, "the package was not found"
    complaints = [f"{module.name}:{complaint}" for module in modules for complaint in rule(module)]
    assert not complaints, "\n".join([rule.__doc__ or "", *complaints])


@pytest.mark.parametrize(("rule", "name", "source"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_can_fail(rule: Rule, name: str, source: str) -> None:
    """A snippet that breaks the rule is complained about."""
    assert list(rule(parse(name, source)))


@pytest.mark.parametrize(("rule", "name", "source"), KEEPS, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_lets_through_what_is_right(rule: Rule, name: str, source: str) -> None:
    """A snippet that keeps the rule is not complained about."""
    assert not list(rule(parse(name, source)))


def test_every_rule_is_shown_to_fail() -> None:
    """No rule without a snippet that breaks it."""
    assert {rule.__name__ for rule in RULES} == {rule.__name__ for rule, _, _ in BREAKS}
