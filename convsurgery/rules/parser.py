"""Text to rules: a scanner with offsets and one method per line of the grammar.

There is no separate list of tokens: what a character means depends on where it stands (``[`` opens the tests of a
selector but is a character class inside a glob), so each method asks the scanner for what may come next.

    rules    = rule {";" rule}                       blank rules are passed over
    rule     = selector "->" target
    selector = place ["[" test {"," test} "]"]
    test     = key op value
    target   = operator ["(" [arg {"," arg}] ")"] ["by" start]
    arg      = name ["=" value]                      a name alone means true
    start    = name ["(" [name "="] number ")"]
    auto     = "auto" "(" target {"|" target} {"," measure op number ["%"]} ")"     in a target's place
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

from convsurgery.errors import RuleError, nearest
from convsurgery.rules.auto import AUTO, AutoTarget, Wish
from convsurgery.rules.keys import KEYS, OPERATORS, NumberKey, TextKey
from convsurgery.rules.model import BY, Rule, Rules, Selector, Target, Test
from convsurgery.rules.source import Source
from convsurgery.rules.values import (
    ARGUMENT,
    GLOB,
    NAME,
    REGEX,
    START,
    ArgValue,
    Glob,
    KeyName,
    Regex,
    TestValue,
    format_argument,
    read_argument,
    read_number,
)

__all__ = ["parse", "parse_selector", "parse_target"]

_BLANK: Final = re.compile(r"\s*")
_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPEN_TESTS: Final = re.compile(r"\[")
_OPEN_ARGS: Final = re.compile(r"\(")
_SHARE: Final = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,3})?%?")
_BY: Final = re.compile(r"by\b(?!-)")
_SIGNS: Final = re.compile(r"[=!<>~]+")
_SPACED_RANGE: Final = re.compile(r"[0-9]+\s*\.\.\s*[0-9]+(?![\w.])")
# What an error calls "found": a word or a single character.
_PIECE: Final = re.compile(r"->|(?:[\w.]|-(?!>))+|.", re.DOTALL)
_AUTO_EXAMPLE: Final = "e.g. auto(linear-mix | pnn, params<=-40%, agreement>=0.98)"
_EXAMPLE: Final = "a rule is written selector->operator, e.g. first-conv->kerv-poly"


class _Token(NamedTuple):
    text: str
    start: int
    end: int


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.position, self.last = text, 0, 0

    # Scanning.

    def take(self, pattern: re.Pattern[str]) -> _Token | None:
        """The next token if it has this form, blanks before it skipped."""
        self.skip()
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = self.last = match.end()
        return _Token(match[0], match.start(), match.end())

    def take_sign(self, sign: str) -> bool:
        self.skip()
        found = self.text.startswith(sign, self.position)
        if found:
            self.position = self.last = self.position + len(sign)
        return found

    def skip(self) -> None:
        match = _BLANK.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def peek(self) -> _Token | None:
        self.skip()
        match = _PIECE.match(self.text, self.position)
        return None if match is None else _Token(match[0], match.start(), match.end())

    def source(self, start: int, **parts: _Token) -> Source:
        return Source(self.text, {"": (start, self.last)} | {name: token[1:] for name, token in parts.items()})

    # Errors.

    def error(self, message: str, token: _Token, hint: str = "") -> RuleError:
        return RuleError(message, self.text, token.start, token.end, hint)

    def expected(self, what: str, hint: str = "") -> RuleError:
        token = self.peek()
        if token is None:  # Behind the last word, not on an empty line after it.
            return RuleError(f"expected {what}, found the end", self.text, len(self.text.rstrip()), None, hint)
        return self.error(f"expected {what}, found {token.text!r}", token, hint)

    def unclosed(self, opening: _Token, closing: str, behind: str, hint: str = "") -> RuleError:
        token = self.peek()
        if token is None or token.text in ("->", ";"):
            told = f"expected ',' or {closing!r} after {behind}"
            return self.error(
                f"{opening.text!r} is never closed", opening, f"{told}\n{hint}" if token is not None and hint else told
            )
        return self.expected(f"',' or {closing!r} after {behind}", hint)

    # Grammar.

    def rules(self) -> Rules:
        rules: list[Rule] = []
        while True:
            while self.take_sign(";"):
                pass
            if self.peek() is None:
                break
            rules.append(self.rule())
            if self.peek() is not None and not self.take_sign(";"):
                raise self.expected("';' or the end after a rule", "rules are separated by ';'")
        if not rules:
            raise RuleError("the rule is empty", self.text, 0, len(self.text), _EXAMPLE)
        return Rules(tuple(rules), source=Source(self.text, {"": (rules[0].located().parts[""][0], self.last)}))

    def rule(self) -> Rule:
        selector = self.selector()
        if not self.take_sign("->"):
            raise self.expected(f"'->' after the selector {selector}", _EXAMPLE)
        target = self.target()
        return Rule(selector, target, source=self.source(selector.source.parts[""][0]))

    def selector(self) -> Selector:
        place = self.take(NAME)
        if place is None:
            token = self.peek()
            python = token is not None and token.text == "<"
            raise self.expected("a selector", "a Python predicate cannot be read from text" if python else _EXAMPLE)
        # Made before the tests are read: of two mistakes the first is reported.
        bare = Selector(place.text, source=self.source(place.start, place=place))
        opening = self.take(_OPEN_TESTS)
        if opening is None:
            return bare
        tests = [self.test()]
        while not self.take_sign("]"):
            named = isinstance(KEYS[tests[-1].key], TextKey)
            if not self.take_sign(","):
                raise self.unclosed(opening, "]", str(tests[-1]), _IN_A_NAME if named else "")
            tests.append(self.test(named))
        return Selector(place.text, tuple(tests), source=self.source(place.start, place=place))

    def test(self, after_name: bool = False) -> Test:
        key = self.take(_WORD)
        if key is None:
            raise self.expected("a test such as k=3")
        known = KEYS.get(key.text)
        if known is None:
            hint = nearest(key.text, KEYS)
            raise self.error(f"unknown test {key.text!r}", key, f"{hint}\n{_IN_A_NAME}" if after_name else hint)
        op = self.take(_SIGNS)
        if op is None:
            raise self.expected(f"a comparison after {key.text}", "one of " + " ".join(OPERATORS))
        if op.text not in OPERATORS:
            raise self.error(f"unknown comparison {op.text!r}", op, "expected one of " + " ".join(OPERATORS))
        value, token = self.text_value(known) if isinstance(known, TextKey) else self.number_value(known)
        return Test(key.text, op.text, value, source=self.source(key.start, key=key, op=op, value=token))

    def text_value(self, key: TextKey) -> tuple[TestValue, _Token]:
        token = self.take(REGEX)
        if token is not None:
            return self.checked(Regex, token.text[1:-1], token), token
        token = self.take(GLOB)
        if token is not None:
            return self.checked(Glob, token.text, token), token
        ahead = self.peek()
        if ahead is not None and ahead.text == "/":
            raise self.error(
                "'/' opens a regular expression that is never closed", ahead, r"write '\/' for a slash in it"
            )
        raise self.wrong_value(key)

    def checked(self, kind: type[Glob] | type[Regex], pattern: str, token: _Token) -> Glob | Regex:
        try:
            return kind(pattern)
        except RuleError as error:
            raise self.error(error.message, token, error.hint) from None

    def number_value(self, key: NumberKey) -> tuple[TestValue, _Token]:
        token = self.take(_SPACED_RANGE) or self.take(GLOB)
        if token is None:
            raise self.wrong_value(key)
        value = KeyName(token.text) if token.text in KEYS else read_number(token.text)
        if value is None:
            raise self.error(key.wants, token, key.hint)
        return value, token

    def wrong_value(self, key: NumberKey | TextKey) -> RuleError:
        token = self.peek() or _Token("", len(self.text.rstrip()), len(self.text.rstrip()) + 1)
        return self.error(key.wants, token, key.hint)

    def target(self) -> Target:
        name = self.take(NAME)
        if name is None:
            raise self.expected("an operator after '->'", "e.g. kerv-poly(degree=3), or keep to leave the convolution")
        if name.text == AUTO:
            return self.auto(name)
        parts: dict[str, tuple[int, int]] = {"": (name.start, name.end)}
        args: list[tuple[str, ArgValue]] = []
        opening = self.take(_OPEN_ARGS)
        if opening is not None and not self.take_sign(")"):
            self.argument(args, parts)
            while not self.take_sign(")"):
                if not self.take_sign(","):
                    raise self.unclosed(opening, ")", args[-1][0], "an argument is written name=value")
                self.argument(args, parts)
        by = self.start(parts) if self.take(_BY) is not None else ""
        return Target(name.text, tuple(args), by, source=Source(self.text, parts))

    def auto(self, name: _Token) -> AutoTarget:
        opening = self.take(_OPEN_ARGS)
        if opening is None:
            raise self.expected(f"'(' after {AUTO}", _AUTO_EXAMPLE)
        options = [self.option()]
        while self.take_sign("|"):
            options.append(self.option())
        wishes: list[Wish] = []
        while not self.take_sign(")"):
            if not self.take_sign(","):
                raise self.unclosed(opening, ")", str((wishes or options)[-1]), _AUTO_EXAMPLE)
            wishes.append(self.wish())
        source = Source(self.text, {"": (name.start, self.last)})
        return AutoTarget(AUTO, options=tuple(options), wishes=tuple(wishes), source=source)

    def option(self) -> Target:
        ahead = self.take(NAME)
        if ahead is not None and ahead.text == AUTO:  # told here: read, it could be nested without end
            raise self.error(f"{AUTO} is no operator to choose", ahead, "sites may always stay as they are")
        if ahead is not None:
            self.position = ahead.start
        return self.target()

    def wish(self) -> Wish:
        metric = self.take(_WORD)
        if metric is None:
            raise self.expected("a measure", _AUTO_EXAMPLE)
        op = self.take(_SIGNS)
        if op is None:
            raise self.expected(f"a comparison after {metric.text}", _AUTO_EXAMPLE)
        value = self.take(_SHARE)
        if value is None:
            raise self.expected(f"a number after {metric.text}{op.text}", _AUTO_EXAMPLE)
        number = float(value.text.rstrip("%")) / (100 if value.text.endswith("%") else 1)
        return Wish(metric.text, op.text, number, source=self.source(metric.start, metric=metric, op=op, value=value))

    def start(self, parts: dict[str, tuple[int, int]]) -> str:
        name = self.take(NAME)
        if name is None:
            raise self.expected("a start after 'by'", "e.g. by neutral(1e-3), by fit or by blend")
        if not START.fullmatch(name.text):
            raise self.error(f"{name.text!r} is no start", name, "e.g. by neutral(1e-3), by fit or by blend")
        opening = self.take(_OPEN_ARGS)
        if opening is None:
            parts[BY] = (name.start, self.last)
            return name.text
        token = self.take(ARGUMENT)
        key = ""
        if token is not None and self.take_sign("="):
            key, token = f"{token.text}=", self.take(ARGUMENT)
        if token is None:
            raise self.expected(f"the number of the start {name.text}", "e.g. by neutral(1e-3)")
        try:
            value = format_argument(read_argument(token.text))
        except ValueError as error:
            raise self.error(str(error), token) from None
        if not self.take_sign(")"):
            raise self.unclosed(opening, ")", f"{name.text}({token.text}")
        parts[BY] = (name.start, self.last)
        return f"{name.text}({key}{value})"

    def argument(self, args: list[tuple[str, ArgValue]], parts: dict[str, tuple[int, int]]) -> None:
        name = self.take(_WORD)
        if name is None:
            raise self.expected("an argument", "an argument is written name=value, e.g. degree=3")
        if name.text in parts:
            raise self.error(f"the argument {name.text!r} is given twice", name)
        value: ArgValue = True
        if self.take_sign("="):
            token = self.take(ARGUMENT)
            if token is None:
                raise self.expected(f"a value for {name.text}", "a number, true, false, none or a word")
            try:
                value = read_argument(token.text)
            except ValueError as error:
                raise self.error(str(error), token) from None
        args.append((name.text, value))
        parts[name.text] = (name.start, self.last)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Rules:
    return _Parser(text).rules()


def _only_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise RuleError(f"{what} is read from a text, not from a value of type {type(text).__name__}", hint=_EXAMPLE)


_IN_A_NAME: Final = "of a name, the signs , ; = and -> are written ? in a glob, or the whole as a /regex/"


def parse(text: str) -> Rules:
    """Read rules.

    >>> str(parse("first-conv [k = 3] -> kerv-poly( learnable ) ;"))
    'first-conv[k=3]->kerv-poly(learnable=true)'
    """
    _only_text(text, "a rule")
    if text.rstrip().endswith("-") and ">" not in text:
        raise RuleError(
            "the rule ends where its arrow begins",
            text,
            len(text.rstrip()) - 1,
            hint="a shell takes '>' for itself and writes a file of that name: put the rule in quotes",
        )
    return _parse(text)


def parse_selector(text: str) -> Selector:
    """Read a selector alone."""
    _only_text(text, "a selector")
    parser = _Parser(text)
    selector = parser.selector()
    if parser.peek() is not None:
        raise parser.expected("the end after a selector")
    return selector


def parse_target(text: str) -> Target:
    """Read an operator and its arguments alone."""
    _only_text(text, "a target")
    parser = _Parser(text)
    target = parser.target()
    if parser.peek() is not None:
        raise parser.expected("the end after an operator")
    return target
