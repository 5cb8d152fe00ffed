"""The values of tests and arguments, and how they are written."""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import dataclass
from typing import Final

from convsurgery.errors import RuleError

__all__ = [
    "ARGUMENT",
    "GLOB",
    "NAME",
    "REGEX",
    "START",
    "ArgValue",
    "Glob",
    "KeyName",
    "Range",
    "Regex",
    "TestValue",
    "format_argument",
    "read_argument",
    "read_number",
]

# A "-" belongs to a word unless it begins the arrow: "first-conv->x" needs no blank before "->".
NAME: Final = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_.]|-(?!>))*")
GLOB: Final = re.compile(r"(?:[\w.*?:]|-(?!>)|\[[^\[\]\s]+\])+")
REGEX: Final = re.compile(r"/((?:\\.|[^/\\\n])*)/")
ARGUMENT: Final = re.compile(r"(?:[\w.+]|-(?!>))+")
#: ``neutral``, ``neutral(0.001)``, ``neutral(eps=0.001)``
START: Final = re.compile(r"[a-z][a-z0-9-]*(?:\((?:[a-z]\w*=)?[^()=\s;,]+\))?")

# Bounded, because int() refuses very long texts; no channel count or seed comes near.
_DIGITS: Final = 30
_INT: Final = re.compile(rf"[+-]?[0-9]{{1,{_DIGITS}}}")
_FLOAT: Final = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf)")
_NUMBER: Final = re.compile(rf"([0-9]{{1,{_DIGITS}}})(?:(x|\s*\.\.\s*)([0-9]{{1,{_DIGITS}}}))?")
_CONSTANTS: Final[dict[str, bool | None]] = {"true": True, "false": False, "none": None}

#: an expression such as ``(a+)+$`` may take longer than the age of the universe
_SECONDS: Final = 1.0
#: signs of an expression, and what the counts of its repetitions may multiply to: they are written out when compiled
_LONGEST: Final = 2000
_REPEATED: Final = 10_000
_COUNT: Final = re.compile(r"[{,](\d{1,30})(?=[},])")

ArgValue = bool | int | float | str | None


@dataclass(frozen=True)
class Range:
    """``low..high``, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


@dataclass(frozen=True)
class KeyName:
    """Another key as the value of a test: the ``cout`` of ``cin=cout``."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Glob:
    """A shell pattern for a whole name; upper and lower case differ, ``*`` crosses dots."""

    pattern: str

    def __post_init__(self) -> None:
        if not GLOB.fullmatch(self.pattern):
            raise RuleError(f"the glob {self.pattern!r} cannot be written in a rule", hint="use a /regex/")
        try:
            fnmatch.fnmatchcase("", self.pattern)
        except re.error as error:  # "[z-a]" before Python 3.11
            raise RuleError(f"the glob {self.pattern!r} is not valid: {error}") from None

    def __str__(self) -> str:
        return self.pattern

    @property
    def literal(self) -> bool:
        """Whether it matches one name only."""
        return not any(sign in self.pattern for sign in "*?[")

    def matches(self, text: str) -> bool:
        return fnmatch.fnmatchcase(text, self.pattern)


@dataclass(frozen=True)
class Regex:
    """A regular expression searched for anywhere in a name; written ``/pattern/``, a slash in it as ``\\/``."""

    pattern: str

    def __post_init__(self) -> None:
        # "\/" and "/" mean the same to `re`; keeping one of them makes equal expressions equal and str() reversible.
        plain = re.sub(r"\\(.)", lambda pair: "/" if pair[1] == "/" else pair[0], self.pattern)
        object.__setattr__(self, "pattern", plain)
        if not plain or "\n" in plain:
            raise RuleError("a regular expression must not be empty or hold a line break", hint=r"write '\n' for one")
        counts = [int(count) for count in _COUNT.findall(plain)]
        if len(plain) > _LONGEST or math.prod(max(1, count) for count in counts) > _REPEATED:
            raise RuleError(f"the regular expression /{self.pattern[:40]}…/ is too large for a name")
        import regex  # for its time limit; it takes what re takes

        try:
            regex.compile(plain)
        except (regex.error, OverflowError, RecursionError, ValueError) as error:
            raise RuleError(f"the regular expression /{self.pattern}/ is not valid: {error}") from None

    def __str__(self) -> str:
        return "/" + self.pattern.replace("/", r"\/") + "/"

    def matches(self, text: str) -> bool:
        """Whether it is found in ``text``; TimeoutError where that takes longer than any sensible one does."""
        import regex

        return regex.search(self.pattern, text, timeout=_SECONDS) is not None


TestValue = int | tuple[int, int] | Range | KeyName | Glob | Regex


def read_number(text: str) -> int | tuple[int, int] | Range | None:
    """``3``, ``3x5`` (height x width) or ``0..4``; None when it is none of them."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    first, joint, second = match.groups()
    if joint is None:
        return int(first)
    return (int(first), int(second)) if joint == "x" else Range(int(first), int(second))


def read_argument(text: str) -> ArgValue:
    """The value of an operator's argument; ValueError says what was expected."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if (math.isinf(number) and "inf" not in text) or text.lstrip("+-").isdigit():
            raise ValueError(f"the number {text[:40]} is too large")
        return number
    if NAME.fullmatch(text):
        return text
    raise ValueError(f"expected a number, true, false, none or a word, found {text!r}")


def format_argument(value: ArgValue) -> str:
    """The inverse of :func:`read_argument`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
