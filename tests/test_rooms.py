"""The rooms of the package import downwards only, and each says what it is for."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "limpq_ext"

BELOW = {
    "values": (),
    "ilp": ("values",),
    "kernels": ("values",),
    "nn": ("kernels", "values"),
    "graph": ("nn", "kernels", "values"),
    "conversion": ("graph", "nn", "kernels", "values"),
    "training": ("graph", "nn", "kernels", "values"),
    "data": ("training", "values"),
    "joint": ("training", "conversion", "graph", "nn", "kernels", "values"),
    "allocation": ("ilp", "values"),
    "export": ("training", "conversion", "graph", "nn", "kernels", "values"),
    "scores": ("joint", "allocation", "training", "conversion", "graph", "nn", "kernels", "values"),
}
"""Room -> rooms that its modules may import, inside functions too. `app` may import all of them."""

THIN = {
    ("values.indicators", "training.step_sizes"),
    ("values.indicators", "values.limpq_files"),
    ("values.policy", "values.limpq_files"),
}
"""Public names of a value that call what reads it from elsewhere, and import it when called."""


def rooms():
    return {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}


def imports(path):
    """The modules of the package that a file imports, as ``room.module``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *inside = name.split(".")
            while inside and not module_of(inside).exists():
                inside.pop()  # a name in a module
            if package == "limpq_ext" and inside:
                yield ".".join(inside)


def module_of(inside):
    """The file of a module or the folder of a room."""
    path = PACKAGE.joinpath(*inside)
    return path if path.is_dir() else path.with_suffix(".py")


def name_of(path):
    """The module in a file, as ``room.module``; that of a package is its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_room_is_in_the_list():
    assert rooms() == {*BELOW, "app"}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_the_rooms_below_it(room):
    steps_up = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        own = name_of(path)
        for module in imports(path):
            if module.split(".")[0] not in (room, *BELOW[room]) and (own, module) not in THIN:
                steps_up.append(f"{own} imports {module}")
    assert not steps_up


def test_imports_run_one_way():
    seen = []
    while len(seen) < len(BELOW):
        ready = [room for room in BELOW if room not in seen and set(BELOW[room]) <= set(seen)]
        assert ready, f"a circle among {set(BELOW) - set(seen)}"
        seen += ready


def test_there_are_no_circles_within_a_room_either():
    used = {}
    for path in PACKAGE.glob("*/**/*.py"):
        own = name_of(path)
        used[own] = {module for module in imports(path) if (own, module) not in THIN} - {own}
    list(graphlib.TopologicalSorter(used).static_order())  # raises CycleError


def test_what_is_thin_is_needed():
    used = {(name_of(path), module) for path in PACKAGE.glob("*/*.py") for module in imports(path)}
    assert used >= THIN


@pytest.mark.parametrize("room", [*BELOW, "app"])
def test_a_room_says_in_a_few_lines_what_it_is_for(room):
    text = (PACKAGE / room / "__init__.py").read_text()
    tree = ast.parse(text)
    told = ast.get_docstring(tree)
    assert told is not None
    own = f"limpq_ext.{room}."
    for node in tree.body[1:]:  # scores alone is a name that users have
        assert room == "scores"
        assert isinstance(node, ast.ImportFrom)
        assert node.module.startswith(own)
    assert 3 <= len(told.splitlines()) <= 7
    assert "Begin with" in told
    assert "mport" in told
