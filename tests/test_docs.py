"""What the documentation says is run, and its tables are held against the registries."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

import convsurgery as cs
from convsurgery.cli import run
from convsurgery.cli.catalogue import catalogue

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page share one namespace, as a reader who types them in order has it."""
    monkeypatch.chdir(tmp_path)
    before = set(cs.list_operators())
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    try:
        for number, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{name(page)}[{number}]", "exec", dont_inherit=True), module.__dict__)
    finally:
        from convsurgery.operators import base

        for extra in set(cs.list_operators()) - before:
            del base._registry[extra]


def test_shell_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "convsurgery"
        assert run(arguments) == 0, line
    assert (tmp_path / "model.onnx").is_file()


def test_readme_shows_the_real_plan() -> None:
    shown = blocks(ROOT / "README.md", "text")[0]
    assert shown.rstrip() == str(cs.plan("resnet18", "first-conv->kerv-poly"))


def test_readme_has_the_two_commands() -> None:
    commands = "".join(blocks(ROOT / "README.md", "console"))
    assert "pip install '.[demo]' && convsurgery demo\n" in commands
    assert "pip install '.[test]' && pytest\n" in commands


def test_operator_table_of_the_readme_is_the_registry() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [
        f"| `{item['name']}` | {item['formula']} | "
        + ", ".join(f"{start} ({kept})" for start, kept in item["starts"].items())
        + " |"
        for item in catalogue()["operators"]
    ]
    assert "|---|---|---|\n" + "\n".join(rows) + "\n" in text


def test_pages_name_everything_in_the_registries() -> None:
    data = catalogue()
    rules = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    for item in [*data["places"], *data["tests"]]:
        assert f"`{item['name']}`" in rules, item["name"]
    operators = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "operators").glob("*.md"))
    onnx = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    for item in data["operators"]:
        assert f"{item['name']}`" in operators or f"## {item['name']}\n" in operators, item["name"]
        assert (item["onnx"] or "") in onnx
        for argument in item["arguments"]:
            assert f"`{argument['name']}`" in operators


def test_every_option_of_the_command_line_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    run(["--help"])
    commands = re.findall(r"^  ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) == 13
    for command in commands:
        assert f"convsurgery {command}" in text
        run([command, "--help"])
        options = set(re.findall(r"(--[a-z][a-z0-9-]+)", capsys.readouterr().out)) - {"--help"}
        missing = sorted(option for option in options if option not in text)
        assert not missing, f"{command}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, _ = target.partition("#")
        if path and not re.match(r"[a-z]+:", path):
            assert (page.parent / path).exists(), f"{name(page)}: {target}"


def test_changelog_has_this_version() -> None:
    assert f"## [{cs.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(cs.__path__, "convsurgery.") if "__main__" not in info.name]
    return ["convsurgery", *found]


@pytest.mark.parametrize("module", _modules())
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples_in_docstrings() -> None:
    tried = sum(doctest.testmod(importlib.import_module(module)).attempted for module in _modules())
    assert tried > 40


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install 'convsurgery[docs]'")
def test_pages_build_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rules" / "index.html").is_file()
