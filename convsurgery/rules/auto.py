"""``auto(...)``: operators to choose from by measurement, and what has to hold in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from convsurgery.errors import nearest
from convsurgery.rules.model import Target
from convsurgery.rules.source import Sourced

__all__ = ["AUTO", "AutoTarget", "Wish"]

AUTO: Final = "auto"

#: what can be wished for, the comparison that makes sense, and an example
_METRICS: Final = {
    "params": ("<=", "params<=-40%"),
    "macs": ("<=", "macs<=-30%"),
    "latency": ("<=", "latency<=-20%"),
    "agreement": (">=", "agreement>=0.98"),
}


@dataclass(frozen=True)
class Wish(Sourced):
    """One promise: ``params<=-40%`` (a change, relative to the whole model) or ``agreement>=0.98``.

    Attributes:
        metric: "params", "macs", "latency" or "agreement".
        op: ``<=`` for changes, ``>=`` for agreement.
        value: as a share: -0.4 and 0.98.
    """

    metric: str
    op: str
    value: float

    def __post_init__(self) -> None:
        place = self.located()
        if self.metric not in _METRICS:
            raise place.error(f"auto knows no measure {self.metric!r}", "metric", nearest(self.metric, _METRICS))
        op, example = _METRICS[self.metric]
        if self.op != op:
            raise place.error(f"{self.metric} is bounded by {op!r}, not {self.op!r}", "op", f"e.g. {example}")
        if self.metric == "agreement" and not 0 <= self.value <= 1:
            raise place.error("agreement is a share from 0 to 1", "value", "e.g. agreement>=0.98 or agreement>=98%")
        if self.metric != "agreement" and not -1 < self.value < 0:
            raise place.error(
                f"{self.metric} wants a change below 0 and above -100%", "value", f"e.g. {example}: 40 % fewer"
            )

    def __str__(self) -> str:
        percent = f"{self.value * 100:.12g}%"
        # As it is read again: 12.34 % is not 0.1234 to the last bit, so a number that is lost so is written out.
        share = f"{self.value:.12g}" if float(f"{self.value:.12g}") == self.value else repr(self.value)
        whole = self.metric == "agreement" or float(percent[:-1]) / 100 != self.value
        return f"{self.metric}{self.op}{share if whole else percent}"


@dataclass(frozen=True, eq=False)
class AutoTarget(Target):
    """The target ``auto(linear-mix | kerv-poly, params<=-40%, agreement>=0.98)``."""

    options: tuple[Target, ...] = ()
    wishes: tuple[Wish, ...] = ()

    def __post_init__(self) -> None:
        if self.by:
            raise self.located().error("auto starts as its operators do", "", "write by behind each of them")
        if not self.options:
            raise self.located().error("auto needs operators to choose from", "", "e.g. auto(linear-mix | pnn)")
        for option in self.options:
            if option.name in ("keep", AUTO):
                raise option.error(f"{option.name} is no operator to choose", hint="sites may always stay as they are")
        seen: set[str] = set()
        for wish in self.wishes:
            if wish.metric in seen:
                raise wish.located().error(f"{wish.metric} is bounded twice")
            seen.add(wish.metric)

    def __str__(self) -> str:
        return f"{AUTO}({', '.join([' | '.join(map(str, self.options)), *map(str, self.wishes)])})"
