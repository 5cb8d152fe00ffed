"""What can be written in a rule, from the registries."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["catalogue", "catalogue_text"]


def catalogue() -> dict[str, Any]:
    """Operators with their arguments and starts, places, and tests, as plain data."""
    from convsurgery.operators import list_operators, operator
    from convsurgery.rules import KEYS, list_selectors

    operators = []
    for name in list_operators():
        cls = operator(name)
        arguments = [
            {"name": field.name, "default": field.default, "help": field.metadata["help"]}
            for field in dataclasses.fields(cls)
        ]
        operators.append(
            {
                "name": name,
                "formula": cls.formula,
                "summary": cls.summary,
                "source": cls.source,
                "arguments": arguments,
                "starts": dict(cls.starts),
                "patterns": list(cls.patterns),
                "onnx": cls.onnx.op_type if cls.onnx else None,
            }
        )
    places = [{"name": p.name, "summary": p.summary, "kind": p.kind} for p in list_selectors()]
    tests = [{"name": name, "summary": key.summary, "example": key.example} for name, key in KEYS.items()]
    return {"operators": operators, "places": places, "tests": tests}


def catalogue_text(width: int = 80) -> str:
    from rich import box
    from rich.table import Table

    from convsurgery.surgery.table import render

    def table(*columns: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(columns):
            made.add_column(column, no_wrap=number == 0)
        return made

    data = catalogue()
    operators = table("operator", "computes", "arguments and their defaults", "starts (kept function)")
    for item in data["operators"]:
        arguments = "\n".join(f"{a['name']}={str(a['default']).lower()}  {a['help']}" for a in item["arguments"])
        starts = ", ".join(f"{name} ({kept})" for name, kept in item["starts"].items())
        operators.add_row(item["name"], item["formula"], arguments or "–", starts)
    places = table("place", "which convolutions")
    patterns = table("pattern", "which layers")
    for item in data["places"]:
        (places if item["kind"] == "site" else patterns).add_row(item["name"], item["summary"])
    tests = table("test", "on", "example")
    for item in data["tests"]:
        tests.add_row(item["name"], item["summary"], item["example"])
    return render(operators, "", places, "", patterns, "", tests, width=width)
