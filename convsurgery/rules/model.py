"""What a rule is once it was read: frozen objects, checked when they are made, whether by the parser or in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from convsurgery.errors import RuleError, nearest
from convsurgery.geometry import Site
from convsurgery.rules.keys import KEYS, OPERATORS, NumberKey, compare, format_number
from convsurgery.rules.places import place_named
from convsurgery.rules.source import Source, Sourced
from convsurgery.rules.values import (
    NAME,
    START,
    ArgValue,
    Glob,
    KeyName,
    Range,
    Regex,
    TestValue,
    format_argument,
    read_argument,
)

__all__ = [
    "BY",
    "PatternSelector",
    "PredicateSelector",
    "Rule",
    "Rules",
    "Selector",
    "Target",
    "Test",
    "failed_tests",
]

#: the part of a target's source where its start stands; no argument can have this name
BY = " by"

_UNREACHED = "no forward call reaches it"


@dataclass(frozen=True)
class Test(Sourced):
    """One condition on a site, such as ``k=3``.

    An order (``k>=3``) or a range must hold for height and width both. A key with several texts (``name``, ``in``)
    passes ``=`` when one of them matches and ``!=`` when none does. An unknown size passes no test.
    """

    key: str
    op: str
    value: TestValue

    def __post_init__(self) -> None:
        self._check()
        value = self.value
        # One spelling for one meaning: 3x3 is 3, and 4..4 is 4.
        if isinstance(value, tuple) and value[0] == value[1]:
            object.__setattr__(self, "value", value[0])
        elif isinstance(value, Range) and value.low == value.high:
            object.__setattr__(self, "value", value.low)

    def _check(self) -> None:
        place, value = self.located(), self.value
        key = KEYS.get(self.key)
        if key is None:
            raise place.error(f"unknown test {self.key!r}", "key", nearest(self.key, KEYS))
        if self.op not in OPERATORS:
            raise place.error(f"unknown comparison {self.op!r}", "op", "expected one of " + " ".join(OPERATORS))
        if self.op not in key.operators:
            raise place.error(f"{self.key} cannot be compared by {self.op!r}", "op", "expected = or !=")
        if not key.accepts(value):
            raise place.error(key.wants, "value", key.hint)
        if isinstance(value, Range):
            if self.op not in ("=", "!="):
                raise place.error(f"a range cannot be compared by {self.op!r}", "op", "expected = or !=")
            if value.low > value.high:
                raise place.error(f"the range {value} is empty", "value", f"write {value.high}..{value.low}")

    def __str__(self) -> str:
        value = "x".join(map(str, self.value)) if isinstance(self.value, tuple) else str(self.value)
        return f"{self.key}{self.op}{value}"

    def matches(self, site: Site) -> bool:
        key, value = KEYS[self.key], self.value
        if not isinstance(key, NumberKey):
            assert isinstance(value, Glob | Regex)
            try:
                return any(value.matches(text) for text in key.read(site)) == (self.op == "=")
            except TimeoutError:
                raise self.located().error(
                    f"{value} takes too long: on {key.read(site)[0]!r} it was not done after a second",
                    "value",
                    "a repetition inside of a repetition, such as (a+)+, tries too much: write a+",
                ) from None
        assert not isinstance(value, Glob | Regex)
        left, right = key.read(site), self._other(site) if isinstance(value, KeyName) else value
        return left is not None and right is not None and compare(left, self.op, right)

    def found(self, site: Site) -> dict[str, str]:
        """What the site has for the keys this test reads, as printed in a reason."""
        key = KEYS[self.key]
        if not isinstance(key, NumberKey):
            return {self.key: "|".join(key.read(site)) or "(none)"}
        values = {self.key: format_number(key.read(site))}
        if isinstance(self.value, KeyName):
            values[self.value.name] = format_number(self._other(site))
        return values

    def _other(self, site: Site) -> int | tuple[int, int] | None:
        assert isinstance(self.value, KeyName)
        other = KEYS[self.value.name]
        assert isinstance(other, NumberKey)
        return other.read(site)

    @property
    def exact(self) -> bool:
        """Whether it admits a single value of its key."""
        if isinstance(self.value, Glob):
            return self.op == "=" and self.value.literal
        return self.op == "=" and isinstance(self.value, int | tuple)


@dataclass(frozen=True)
class Selector(Sourced):
    """A place and the tests a convolution there has to pass, all of them."""

    place: str
    tests: tuple[Test, ...] = ()

    def __post_init__(self) -> None:
        try:
            place_named(self.place)
        except RuleError as error:
            raise self.located().error(error.message, "place", error.hint) from None
        seen: set[Test] = set()
        exact: dict[str, Test] = {}
        for test in self.tests:
            if test in seen:
                raise test.error(f"the test {test} is written twice")
            if isinstance(test.value, int | tuple) and test.op == "=":
                rival = exact.get(test.key)
                if rival is not None:
                    hint = "all tests must hold; use a range a..b, or two rules"
                    raise test.error(f"{rival} and {test} cannot both hold", hint=hint)
            seen.add(test)
            if test.exact:
                exact.setdefault(test.key, test)

    def __str__(self) -> str:
        return self.place + (f"[{', '.join(map(str, self.tests))}]" if self.tests else "")

    @property
    def structural(self) -> bool:
        """Whether it names a pattern of several layers rather than single convolutions."""
        return place_named(self.place).kind == "structure"

    @property
    def singles_out(self) -> bool:
        """Whether it names one convolution alone, so that not replacing it is an error and not a skip."""
        return place_named(self.place).single or _single(self.tests)

    def reason(self, site: Site, sites: Sequence[Site]) -> str | None:
        """Why ``site``, one of all ``sites`` of the model, is not taken; None when it is."""
        if site.index < 0:
            return _UNREACHED
        place = place_named(self.place)
        if place.kind == "structure" or place.match is None:
            return f"{self.place} is a pattern of several layers, not one convolution"
        return place.match(site, sites) or failed_tests(self.tests, site)


def failed_tests(tests: Sequence[Test], site: Site) -> str | None:
    """What ``site`` has and the tests want, or None when it passes them all."""
    failed = [test for test in tests if not test.matches(site)]
    if not failed:
        return None
    found = {key: text for test in failed for key, text in test.found(site).items()}
    has = ", ".join(f"{key}={text}" for key, text in found.items())
    return f"{has}, the rule wants {', '.join(map(str, failed))}"


@dataclass(frozen=True)
class PredicateSelector(Sourced):
    """A Python function on sites in the place of a selector; its text, ``<name>``, is for reading only."""

    function: Callable[[Site], bool]

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"<{name.strip('<>')}>"

    @property
    def structural(self) -> bool:
        return False

    @property
    def singles_out(self) -> bool:
        return False

    def reason(self, site: Site, sites: Sequence[Site]) -> str | None:
        """As :meth:`Selector.reason`."""
        if site.index < 0:
            return _UNREACHED
        return None if self.function(site) else f"{self} declines it"


@dataclass(frozen=True)
class PatternSelector(Sourced):
    """A structural pattern given as code in the place of a selector; its text, ``<name>``, is for reading only.

    ``code`` is an ``nn.Module``, a function of a tensor and layers, or what such a pattern was compiled to. The tests
    are asked of the first convolution of a match.
    """

    code: object
    tests: tuple[Test, ...] = ()

    def __str__(self) -> str:
        name = getattr(self.code, "name", None) or getattr(self.code, "__name__", type(self.code).__name__)
        return f"<{str(name).strip('<>')}>" + (f"[{', '.join(map(str, self.tests))}]" if self.tests else "")

    @property
    def structural(self) -> bool:
        return True

    @property
    def singles_out(self) -> bool:
        return _single(self.tests)

    def reason(self, site: Site, sites: Sequence[Site]) -> str | None:
        """As :meth:`Selector.reason`; a pattern is never a single convolution."""
        return f"{self} is a pattern of several layers, not one convolution"


def _single(tests: Sequence[Test]) -> bool:
    return any(test.key in ("name", "index") and test.exact for test in tests)


@dataclass(frozen=True, eq=False)
class Target(Sourced):
    """An operator by name, its arguments, and how it starts; whether they exist is checked elsewhere.

    ``by`` is the start's text, such as ``neutral(0.001)``; empty where the rule leaves it open.
    """

    name: str
    args: tuple[tuple[str, ArgValue], ...] = ()
    by: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise RuleError(f"{self.name!r} is not an operator name a rule can hold")
        if self.by and not START.fullmatch(self.by):
            raise RuleError(f"{self.by!r} is not a start a rule can hold")
        # First, because an error about a name shows the values too.
        for name, value in self.args:
            if not _writable(value):
                kind = type(value).__name__
                raise RuleError(
                    f"a rule cannot hold the value of {self.name}({name}), of type {kind}", hint=_ARGUMENT_TYPES
                )
        seen: set[str] = set()
        for name, _ in self.args:
            if not (name.isascii() and name.isidentifier()):
                raise self.error(f"{name!r} is not an argument name")
            if name in seen:
                raise self.error(f"the argument {name!r} is given twice", name)
            seen.add(name)

    # 1, 1.0 and True are equal to Python but not to an operator, so targets are equal when they are written alike.
    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Target) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return self._written().text

    def _written(self) -> Source:
        text, parts = self.name, {"": (0, len(self.name))}
        for number, (name, value) in enumerate(self.args):
            text += ", " if number else "("
            parts[name] = (len(text), len(text) + len(name) + 1 + len(format_argument(value)))
            text += f"{name}={format_argument(value)}"
        text += ")" * bool(self.args)
        if self.by:
            text += " by "
            parts[BY] = (len(text), len(text) + len(self.by))
            text += self.by
        return Source(text, parts)

    def located(self) -> Source:
        return self.source if self.source.text else self._written()

    def error(self, message: str, arg: str | None = None, hint: str = "") -> RuleError:
        """A RuleError with the caret under the operator's name, or under the argument ``arg``."""
        return self.located().error(message, arg or "", hint)


_ARGUMENT_TYPES = "expected an int, float, bool, None or a word such as channel"


def _writable(value: object) -> bool:
    if not isinstance(value, bool | int | float | str | None):
        return False
    try:
        back = read_argument(format_argument(value))
    except ValueError:
        return False
    return type(back) is type(value) and back == value


@dataclass(frozen=True)
class Rule(Sourced):
    """What to look for and what to put there."""

    selector: Selector | PredicateSelector | PatternSelector
    target: Target

    def __str__(self) -> str:
        return f"{self.selector}->{self.target}"

    @property
    def keeps(self) -> bool:
        """Whether it shields its sites from the rules behind it."""
        return self.target.name == "keep"


@dataclass(frozen=True)
class Rules(Sourced):
    """Rules in order: the first that takes a site wins."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise RuleError(
                "no rule was given", hint="a rule is written selector->operator, e.g. first-conv->kerv-poly"
            )

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)
