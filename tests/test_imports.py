"""Who may import whom: the arrows of the house, and that they all point the same way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridges.base import bridge_names

ROOT = Path(__file__).parents[1]
LEAVES = {"config", "files", "interrupt", "base", "layout"}  # import no other room
# Which rooms a room may import, beside `bridges` itself (its version).
MAY: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "layers": set(),
    "text": {"towers"},
    "pairs": {"base", "towers"},
    "a bridge": {"base", "layers", "a bridge", "pairs", "text"},
    "sight": {"base"},
    "towers": {"sight"},
    "recipe": {"config"},
    "adapter": {"config", "towers"},
    "data": {"config", "files"},
    "model": {"base", "layout", "sight", "towers"},
    "objectives": {"a bridge", "layers", "layout", "model", "data", "pairs", "towers"},
    "saved": {"adapter", "base", "config", "files", "recipe", "towers"},
    "build": {"adapter", "base", "config", "data", "interop", "model", "pairs", "saved", "towers"},
    "checkpoint": {"adapter", "build", "files", "saved", "towers"},
    "store": {"base", "build", "files", "towers"},
    "merge": {"adapter", "build", "checkpoint", "config", "files", "saved", "towers"},
    "training": {
        *("adapter", "build", "checkpoint", "config", "data", "files", "interrupt", "model", "objectives"),
        *("recipe", "saved", "store", "towers"),
    },
    "inference": {
        "a bridge",
        "base",
        "build",
        "checkpoint",
        "data",
        "files",
        "interrupt",
        "layers",
        "model",
        "objectives",
        "saved",
        "sight",
        "towers",
    },
    "evaluation": {
        *("build", "checkpoint", "config", "data", "files"),
        *("inference", "objectives", "saved", "store", "towers"),
    },
    "interop": set(),
    "chat": {"build", "checkpoint", "data", "files", "inference", "interrupt", "saved"},
    "serve": {"build", "checkpoint", "data", "inference"},
}
WHOLE_HOUSE = {"cli", "verbs", "demo", "benchmark", "doctor"}  # may import all; only the command line imports them
CLOSED = {"chat", "recipes", *WHOLE_HOUSE}

BRIDGES = frozenset(bridge_names())

Edge = tuple[str, str, str]  # file, its room, the room that it imports


def room_of(module: str) -> str:
    """`bridges.data.batch` is in the room `data`; files of bridges are all one room."""
    parts = module.split(".")
    if parts[0] != "bridges":
        return parts[0]
    if len(parts) == 1:
        return "bridges"
    return "a bridge" if parts[1] in BRIDGES else parts[1]


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of our own modules that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            inner = module == "bridges"  # `from bridges import model` is an import of the model
            names = [f"bridges.{a.name}" if inner and not a.name.startswith("__") else module for a in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("bridges", "chat", "recipes"))


def edges() -> list[Edge]:
    found = []
    for path in sorted([*ROOT.glob("bridges/**/*.py"), *ROOT.glob("chat/**/*.py")]):
        where = path.relative_to(ROOT)
        package = ".".join(where.parent.parts)
        module = ".".join(where.with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [(str(where), room_of(module), room_of(name)) for name in imported(tree, package)]
    return found


def check(found: list[Edge]) -> list[str]:
    """What is wrong, one line each."""
    wrong = []
    for path, room, target in found:
        if target in (room, "bridges"):
            continue
        if room in WHOLE_HOUSE:
            if target in CLOSED and room not in ("cli", "verbs"):
                wrong.append(f"{path}: only the command line imports {target}")
        elif room not in MAY:
            wrong.append(f"{path}: the room {room} has no place in the house yet; give it one in MAY")
        elif target not in MAY[room]:
            wrong.append(f"{path}: {room} may not import {target}")
    return wrong


def test_every_import_follows_the_arrows():
    assert check(edges()) == []


def test_the_check_sees_what_it_should():
    found = edges()
    assert ("bridges/model.py", "model", "towers") in found
    assert ("bridges/projector.py", "a bridge", "base") in found
    assert ("bridges/data/sources.py", "data", "config") in found
    assert {room for _, room, _ in found} >= {"checkpoint", "training", "inference", "evaluation", "objectives", "cli"}


@pytest.mark.parametrize(
    ("room", "target"),
    [
        ("data", "model"),
        ("data", "towers"),
        ("a bridge", "model"),
        ("a bridge", "towers"),
        ("towers", "data"),
        ("base", "config"),
        ("config", "base"),
        ("model", "data"),
        ("inference", "evaluation"),
        ("training", "inference"),
        ("saved", "build"),
        ("build", "checkpoint"),
        ("checkpoint", "training"),
        ("chat", "training"),
        ("evaluation", "chat"),
        ("training", "cli"),
        ("demo", "chat"),
        ("a new room", "base"),
    ],
)
def test_an_arrow_that_points_the_wrong_way_is_told(room: str, target: str):
    assert len(check([("bridges/x.py", room, target)])) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import bridges.model",
        "from bridges.model import BridgedModel",
        "from bridges import model",
        "from ..model import BridgedModel",
        "from .. import model",
        "def late():\n    from bridges.model import BridgedModel",
    ],
)
def test_no_way_to_write_an_import_is_overlooked(line: str):
    assert {room_of(name) for name in imported(ast.parse(line), "bridges.data")} == {"model"}


def test_arrows_never_lead_back():
    reached = {room: set(targets) - {room} for room, targets in MAY.items()}
    for _ in MAY:
        reached = {room: targets.union(*(reached[t] for t in targets)) for room, targets in reached.items()}
    assert [room for room, targets in reached.items() if room in targets] == []
