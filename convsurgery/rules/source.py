"""Where an object was written, so that a stage long after parsing can still draw a caret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from convsurgery.errors import RuleError

__all__ = ["NOWHERE", "Source", "Sourced"]


@dataclass(frozen=True)
class Source:
    """A text and the ``(start, end)`` offsets of the named parts of one object in it; the part ``""`` is the object."""

    text: str = ""
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def error(self, message: str, part: str = "", hint: str = "") -> RuleError:
        """A RuleError with the caret under ``part``, or under the whole object when it has no such part."""
        start, end = self.parts.get(part) or self.parts.get("") or (0, len(self.text))
        return RuleError(message, self.text, start, end, hint)


NOWHERE = Source()


@dataclass(frozen=True)
class Sourced:
    """Base of the rule objects. The source takes no part in equality: two spellings of one rule are one rule."""

    source: Source = field(default=NOWHERE, compare=False, repr=False, kw_only=True)

    def located(self) -> Source:
        """The text this was parsed from; the canonical text for an object built in Python."""
        text = self.source.text
        if text:
            return self.source
        text = str(self)
        return Source(text, {"": (0, len(text))})

    def error(self, message: str, *, hint: str = "") -> RuleError:
        """A RuleError about this object, to be raised by the caller."""
        return self.located().error(message, hint=hint)
