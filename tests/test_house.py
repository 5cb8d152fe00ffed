"""The layout: which way imports point, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convsurgery

PACKAGE = Path(convsurgery.__file__).parent

#: What each part may import, besides itself. Parts on one line never import each other.
ALLOWED = {
    "errors": set(),
    "geometry": {"errors"},
    "plain": {"errors"},
    "files": {"errors", "plain"},
    "folding": {"errors"},
    "adapters": {"errors", "folding", "geometry"},
    "rules": {"errors", "geometry"},
    "zoo": {"errors", "geometry", "plain", "files"},
    "graph": {"errors", "plain", "geometry", "adapters", "rules"},
    "operators": {"errors", "folding", "geometry", "rules"},
    "pruning": {"errors", "operators"},
    "functional": {"operators"},
    "surgery": {
        "errors",
        "folding",
        "plain",
        "files",
        "geometry",
        "adapters",
        "rules",
        "zoo",
        "graph",
        "operators",
        "models",
    },
    "adapt": {"errors", "plain", "files", "geometry", "adapters", "rules", "zoo", "graph", "operators", "surgery"},
    "export": {"errors", "plain", "files", "geometry", "adapters", "rules", "zoo", "graph", "operators", "surgery"},
    "models": {"errors", "geometry", "operators"},
    "api": {
        "errors",
        "plain",
        "geometry",
        "adapters",
        "rules",
        "zoo",
        "graph",
        "operators",
        "models",
        "surgery",
        "adapt",
        "export",
    },
    "bench": {"errors", "plain", "files", "geometry", "rules", "operators", "adapt", "api", "cli"},
    "recipes": {"errors", "plain", "files", "rules", "zoo", "surgery", "adapt", "api"},
    "coverage": {"errors", "plain", "files", "zoo", "surgery", "api"},
    "cli": {
        "errors",
        "files",
        "geometry",
        "rules",
        "zoo",
        "operators",
        "surgery",
        "adapt",
        "export",
        "api",
        "bench",
        "coverage",
        "recipes",
    },
    "__main__": {"cli"},
}


def _imports(path: Path) -> set[str]:
    """The parts of convsurgery that a file imports at any depth; the bare package is its lazy public face."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "convsurgery":
                found |= {alias.name for alias in node.names if alias.name in ALLOWED}
            elif node.module and node.module.startswith("convsurgery."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("convsurgery.")}
    return found


def _files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    wrong = _imports(path) - ALLOWED[part] - {part}
    assert not wrong, f"{part} must not import {sorted(wrong)}"


def test_allowed_imports_have_no_cycle() -> None:
    order: list[str] = []
    left = {name: set(parts) for name, parts in ALLOWED.items()}
    left["bench"] -= {"cli"}  # python -m convsurgery.bench starts the command line, and nothing else
    while left:
        free = sorted(name for name, parts in left.items() if parts <= set(order))
        assert free, f"a cycle among {sorted(left)}"
        order += free
        for name in free:
            del left[name]


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"onnx", "onnxruntime", "onnxscript", "accelerate", "typer", "rich"}


def test_import_loads_nothing_heavy() -> None:
    assert not _modules_after("import convsurgery") & (HEAVY | {"torch", "timm"})


def test_converting_loads_nothing_heavy() -> None:
    assert not _modules_after("import convsurgery; convsurgery.convert, convsurgery.finetune, convsurgery.save") & HEAVY


def test_help_loads_no_torch() -> None:
    loaded = _modules_after("from convsurgery.cli import run\nrun(['--help'])")
    assert "torch" not in loaded
    assert "typer" in loaded


def test_every_public_name_exists() -> None:
    for name in convsurgery.__all__:
        assert getattr(convsurgery, name) is not None
    assert set(convsurgery.__all__) <= set(dir(convsurgery))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        convsurgery.nonsense  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """The lazy table and the block for type checkers name the same things, from the same modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    named = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert named == {**convsurgery._LAZY, **dict.fromkeys(convsurgery._MODULES, "convsurgery")}


def test_no_module_is_long() -> None:
    long = {path.name: n for path in _files() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
