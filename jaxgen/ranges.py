"""The range of each number in a config: part of its type, checked when the config is made."""

import dataclasses
import functools
import math
import typing
from typing import Annotated, Any

from jaxgen.errors import UserError

# What the int32 of a device counts to.
MAX_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval from `low` to `high`; NaN and infinity are in none."""

    low: int | float
    high: int | float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: int | float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and value != math.inf

    def text(self, value: int | float = 0) -> str:
        """Names it: `from 1 on`, `above 0`; with the end of int32 where a value is past that."""
        low = f"{'above' if self.open_low else 'from'} {self.low}"
        if self.high == math.inf or (self.high == MAX_INT and not value > MAX_INT):
            return low if self.open_low else f"{low} on"
        return f"{low} to {'below ' if self.open_high else ''}{self.high}"


Count = Annotated[int, Range(1, MAX_INT)]
CountOrZero = Annotated[int, Range(0, MAX_INT)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, open_low=True)]
PositiveOrZero = Annotated[float, Range(0)]
AboveOne = Annotated[float, Range(1, open_low=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, open_high=True)]


def range_of(kind: Any) -> Range | None:
    """Returns the range that is part of a type, or of one in a union."""
    for option in (kind, *typing.get_args(kind)):
        for item in getattr(option, "__metadata__", ()):
            if isinstance(item, Range):
                return item
    return None


def check_ranges(config: Any, prefix: str) -> None:
    """Checks every number of a dataclass against the range in its type.

    Values of another type are for `fields` to refuse.

    Raises:
        UserError: the first outside; the message names it `prefix` + field.
    """
    for name, allowed in _ranges(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, int | float) and value not in allowed:
            raise UserError(f"{prefix}{name}={value}; use a number {allowed.text(value)}")


@functools.cache
def _ranges(cls: type) -> dict[str, Range]:
    kinds = typing.get_type_hints(cls, include_extras=True)
    return {name: found for name, kind in kinds.items() if (found := range_of(kind))}
