"""Every error a user of convsurgery can meet, in one tree.

Each text says what was wrong, where, and what would work. The command line prints the text alone; library users catch
:class:`ConvSurgeryError` or one of its branches.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "ConvSurgeryError",
    "ConvSurgeryWarning",
    "ConversionError",
    "DataError",
    "ExportError",
    "ModelError",
    "NoMatchError",
    "ParityError",
    "RecipeError",
    "RuleError",
    "SettingsError",
    "StorageError",
    "TrainingError",
    "nearest",
    "warn",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the known words closest to ``name``, or all of them when none is close.

    >>> nearest("kerv-pol", ["kerv-poly", "kerv-gauss"])
    "did you mean 'kerv-poly'?"
    """
    words = sorted(set(known))
    close = difflib.get_close_matches(name, words, n=3, cutoff=0.6)
    if close:
        # The second best is worth naming only when it is about as close as the best.
        score = {word: difflib.SequenceMatcher(None, word, name).ratio() for word in close}
        close = [word for word in close if score[word] > score[close[0]] - 0.1]
        return "did you mean " + " or ".join(repr(word) for word in close) + "?"
    return "known: " + ", ".join(words) if words else ""


class ConvSurgeryWarning(UserWarning):
    """What convsurgery warns of; the command line prints its text alone."""


def warn(text: str) -> None:
    """A :class:`ConvSurgeryWarning` at the line that called this package, whatever of it and torch lies in between."""
    inside = (os.path.dirname(__file__), os.sep + "torch" + os.sep, os.sep + "contextlib.py")
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ConvSurgeryWarning, stacklevel=level)


class ConvSurgeryError(Exception):
    """Base of all errors raised on purpose by convsurgery."""


class RuleError(ConvSurgeryError, ValueError):
    """A rule that cannot be read or cannot mean anything.

    Args:
        message: what is wrong.
        text: the whole rule text, or "" when the rule was not written as text.
        start: offset of the first offending character in ``text``.
        end: offset behind the last offending character; a single caret is drawn when absent.
        hint: what would work.
    """

    def __init__(self, message: str, text: str = "", start: int = 0, end: int | None = None, hint: str = "") -> None:
        self.message, self.text, self.start, self.hint = message, text, start, hint
        self.end = start + 1 if end is None else end
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.message]
        if self.text:
            # One line of the rule, so that the caret stands under the character also in a multi-line rule.
            begin = self.text.rfind("\n", 0, self.start) + 1
            stop = self.text.find("\n", begin)
            line = self.text[begin:] if stop < 0 else self.text[begin:stop]
            width = max(1, min(self.end - begin, len(line)) - (self.start - begin))
            lines += ["  " + line.replace("\t", " "), "  " + " " * (self.start - begin) + "^" * width]
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class ArgumentError(RuleError):
    """An operator argument or start of the wrong kind or out of range; ``argument`` names it."""

    def __init__(self, argument: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.argument = argument


class NoMatchError(RuleError):
    """No site of the model is taken by any rule; the text lists near misses with their reasons."""


class ModelError(ConvSurgeryError):
    """A model that cannot be named, built, loaded with weights, run or traced."""


class ConversionError(ConvSurgeryError):
    """A site that cannot be converted although the user asked for exactly that one, or weights that are not finite."""


class StorageError(ConvSurgeryError):
    """A folder that cannot be saved to or loaded from."""


class DataError(ConvSurgeryError):
    """A dataset that cannot be found or does not have the expected form."""


class TrainingError(ConvSurgeryError):
    """A fine-tuning run that was stopped: not-a-number, divergence; the text says what to change."""


class SettingsError(TrainingError, ValueError):
    """A setting of fine-tuning that is not legal; names what is."""


class RecipeError(ConvSurgeryError, ValueError):
    """A recipe file with a key or value that has no place; names the line and what would be legal."""


class ExportError(ConvSurgeryError):
    """An export that cannot be written."""


class ParityError(ExportError):
    """An ONNX file that does not compute what the PyTorch model computes."""
