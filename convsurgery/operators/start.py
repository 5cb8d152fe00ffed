"""Starts: how a new operator begins from the convolution whose place it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from convsurgery.errors import ArgumentError, nearest

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """How a new operator begins from the convolution.

    ``neutral(eps)``: the operator's own limit in which it computes the convolution. ``fit(ridge)``: as near to the
    convolution as the data allow. ``blend(t)``: (1 − t) · convolution + t · operator, the convolution alone at first.
    ``copy``: the operator in its own form, on the convolution's weights. ``project``: the nearest weights there are,
    without data. ``random(seed)``: new weights.

    Attributes:
        name: the start's name.
        value: its one number, or None for the operator's default.
        scaled: of a neutral start, whether the kernel's filters are scaled and a gain undoes that, as in plans that
            convsurgery 0.1 wrote.
    """

    name: str
    value: float | None = None
    scaled: bool = False

    ARGUMENT: ClassVar[Mapping[str, str]] = {
        "neutral": "eps",
        "copy": "",
        "fit": "ridge",
        "project": "",
        "random": "seed",
        "blend": "t",
    }

    @classmethod
    def parse(cls, text: str | Start) -> Start:
        """Read ``neutral``, ``neutral(1e-3)``, ``neutral(eps=1e-3)``, ``fit(0.01)``, ``random(0)``, ..."""
        if isinstance(text, Start):
            return text
        if not isinstance(text, str):
            raise ArgumentError("start", f"a start is a text such as neutral(1e-3), not a {type(text).__name__}")
        found = re.fullmatch(r"\s*([\w-]+)\s*(?:\(\s*(?:(\w+)\s*=\s*)?([^()=\s]+)\s*\))?\s*", text)
        if not found or found[1] not in cls.ARGUMENT:
            raise ArgumentError("start", f"unknown start {text!r}", nearest(found[1] if found else text, cls.ARGUMENT))
        name, key, number = found.groups()
        argument = cls.ARGUMENT[name]
        if number is None:
            return cls(name)
        if not argument or key not in (None, argument):
            takes = f"takes only {argument}" if argument else "takes no argument"
            raise ArgumentError("start", f"start {name} {takes}: {text!r}")
        try:
            value = float(number)
        except ValueError:
            raise ArgumentError("start", f"start {name}: {number!r} is not a number") from None
        if name == "neutral" and not 0 <= value <= 1:
            raise ArgumentError("start", f"start neutral: eps must be from 0 to 1, not {number}")
        if name == "fit" and not 0 < value <= 1:
            raise ArgumentError("start", f"start fit: ridge must be above 0 and at most 1, not {number}")
        if name == "blend" and not 0 <= value <= 1:
            raise ArgumentError("start", f"start blend: t must be from 0 to 1, not {number}")
        if name == "random" and not (0 <= value < 2**53 and value.is_integer()):
            raise ArgumentError("start", f"start random: seed must be a whole number from 0 to 2^53, not {number}")
        return cls(name, value)

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        number = f"{int(self.value)}" if self.name == "random" else f"{self.value:.6g}"
        return f"{self.name}({self.ARGUMENT[self.name]}={number})"
