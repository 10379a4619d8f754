"""Imports point down the map at the top of orchestra/__init__.py, never up; and each library has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "orchestra"
CORE_LIBRARIES = {"attr", "attrs", "cffi", "trio"}
# What pure words may use of the standard library: nothing here knows of time, threads, files or chance.
PURE = {
    "__future__",
    "base64",
    "binascii",
    "bisect",
    "collections",
    "copy",
    "difflib",
    "enum",
    "fnmatch",
    "functools",
    "heapq",
    "inspect",
    "itertools",
    "math",
    "operator",
    "re",
    "types",
    "typing",
}


def name_of(path: Path) -> str:
    """The dotted name of a module, without the leading "orchestra."; "" for the front door."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def read_map() -> list[tuple[str, list[str]]]:
    """The layers with their rooms, from the top down."""
    layers: list[tuple[str, list[str]]] = []
    for line in (PACKAGE / "__init__.py").read_text().splitlines():
        if found := re.match(r"#   (\w*)\s{2,}(\S.*?)\s{3,}\S", line):
            rooms = [room.strip().rstrip("/") for room in re.sub(r"\(.*?\)", "", found[2]).split(",")]
            if found[1]:
                layers.append((found[1], rooms))
            else:  # the layer's next line
                layers[-1][1].extend(rooms)
    return layers


MAP = read_map()
HEIGHT = {room: -depth for depth, (_, rooms) in enumerate(MAP) for room in rooms}
WORDS = [name for name in MODULES if name.partition(".")[0] in MAP[-1][1]]


def test_the_design_has_the_same_map() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    rows = {name: cell.partition(";")[0] for name, cell in re.findall(r"^\| (\w+) \| (`.*?) \|", text, re.MULTILINE)}
    for layer, rooms in MAP:
        told = re.findall(r"`(\w+)/?`", re.sub(r"\(.*?\)", "", rows[layer]))
        assert sorted(told) == sorted(rooms), layer


def imports(name: str) -> Iterator[tuple[str, str]]:
    """What a module imports: ("orchestra", the module's name) or ("", another top-level package). Lazy ones too."""
    package = [part for part in name.split(".") if part]
    if MODULES[name].name != "__init__.py":
        package.pop()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                yield ("orchestra", rest) if top == "orchestra" else ("", top)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            top, _, rest = (node.module or "").partition(".")
            yield ("orchestra", rest) if top == "orchestra" else ("", top)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield "orchestra", whole if whole in MODULES else ".".join(base)


def test_map_is_read_and_names_what_is_there():
    assert [layer for layer, _ in MAP] == ["door", "windows", "house", "machine", "host", "silicon", "words"]
    rooms = {name.partition(".")[0] for name in MODULES} - {""}
    assert set(HEIGHT) == rooms
    assert sum(len(named) for _, named in MAP) == len(rooms)  # each once


@pytest.mark.parametrize("room", sorted(room for room in HEIGHT if (PACKAGE / room).is_dir()))
def test_a_room_opens_with_its_job_what_it_may_import_and_the_one_to_copy(room):
    text = ast.get_docstring(TREES[room]) or ""
    assert re.search(r"\b[Ii]t may import|\bIt imports nothing", text), text
    copied = re.search(r"The one to copy: `(.+?)`", text)
    assert copied, text
    assert (PACKAGE / room / copied[1]).exists()


def test_imports_are_resolved_as_python_does():
    assert ("orchestra", "model.exits") in set(imports("native.records"))  # from ..model import exits
    assert ("orchestra", "native") in set(imports("backend.kvm.ioctl"))  # from ...native import lib
    assert ("orchestra", "backend.kvm.machine") in set(imports("backend"))  # in a function
    assert ("", "trio") in set(imports("fleet.fleet"))


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_down_the_map(name):
    room = name.partition(".")[0]
    for kind, target in imports(name):
        if kind == "orchestra" and target.partition(".")[0] != room:
            assert target, f"{name} imports the front door"
            assert HEIGHT[target.partition(".")[0]] <= HEIGHT[room], f"{name} imports {target}, which is above it"


def test_rooms_of_one_layer_do_not_go_round_in_circles():
    below: dict[str, set[str]] = {room: set() for room in HEIGHT}
    for name in MODULES:
        room = name.partition(".")[0]
        if room:
            below[room] |= {t.partition(".")[0] for kind, t in imports(name) if kind == "orchestra"} - {room, ""}
    done: set[str] = set()
    while len(done) < len(below):
        ready = {room for room in below if room not in done and below[room] <= done}
        assert ready, f"a circle in {sorted(set(below) - done)}"
        done |= ready


@pytest.mark.parametrize("name", WORDS)
def test_words_know_of_no_trio_no_clock_and_no_io(name):
    for kind, target in imports(name):
        if kind == "":
            assert target in PURE | {"attrs"}, f"{name} imports {target}"
    called = {n.func.id for n in ast.walk(TREES[name]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


def users_of(library: str) -> list[str]:
    return [name for name in MODULES if ("", library) in set(imports(name))]


OTHERS = sorted({target for name in MODULES for kind, target in imports(name) if kind == ""})
OPTIONAL = [library for library in OTHERS if library not in sys.stdlib_module_names | CORE_LIBRARIES]


def test_there_are_optional_libraries_to_look_at():
    assert {"cyclopts", "rich"} <= set(OPTIONAL)


@pytest.mark.parametrize("library", OPTIONAL)
def test_optional_library_has_one_module_that_imports_it_and_is_an_extra(library):
    assert len(users_of(library)) == 1
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    development = {"dev", "docs", "lint", "test", "types"}
    named = {
        re.match(r"[\w-]+", line)[0] for extra, lines in extras.items() if extra not in development for line in lines
    }  # type: ignore[index]
    assert library in {name.replace("-", "_").lower() for name in named}


def test_c_extension_has_one_import_door():
    assert [name for name in MODULES if ("orchestra", "native._core") in set(imports(name))] == ["native"]
    assert users_of("cffi") == ["native._build"]


def test_importing_orchestra_loads_no_optional_library():
    code = "import sys, orchestra; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "orchestra.fleet" in loaded.split()
    assert not {name.partition(".")[0] for name in loaded.split()} & set(OPTIONAL)


# ---- nothing is global (rule 14)

SHARED = {"Lock", "RLock", "Event", "Condition", "Semaphore", "count", "deque", "defaultdict", "Counter", "local"}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_keeps_counters_registries_or_locks(name):
    tree = TREES[name]
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            function = node.value.func
            made = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            assert made not in SHARED, f"{name}:{node.lineno}"


# ---- sizes

METHODS, PARAMETERS, MAP_LINES = 30, 8, 20
DECLARED = {"cli.app.run", "cli.app.journal"}
"""Commands: their parameters are the options that users see, each declared once."""


@pytest.mark.parametrize("name", MODULES)
def test_no_class_has_too_many_methods_and_no_signature_too_many_parameters(name):
    """Fields of a spec are no parameters that anybody writes down: attrs makes its constructor."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef):
            methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert len(methods) <= METHODS, node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and f"{name}.{node.name}" not in DECLARED:
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([one for one in taken if one.arg not in ("self", "cls")]) <= PARAMETERS, node.name


def test_the_map_fits_the_front_door():
    lines = (PACKAGE / "__init__.py").read_text().splitlines()
    assert 10 < sum(1 for line in lines if line.startswith("#")) <= MAP_LINES
