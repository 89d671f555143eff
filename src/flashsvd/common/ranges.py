"""Ranges of numbers, and what is said of a value that does not lie in one."""

from __future__ import annotations

import numbers
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers that are all of what is given: `Range(at_least=0, below=1)`. It has one end on a side, or none."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def refusal(self, value: Any, *, whole: bool) -> str | None:
        """Why a value cannot be used, as the end of a sentence; None where it can.

        Args:
            whole: only whole numbers can.
        """
        kind = "a whole number" if whole else "a number"
        usable = _is_whole(value) if whole else _is_finite(value)
        if usable and value in self:
            return None
        if self.at_least is not None and self.at_most is not None:
            return f"must be {kind} from {_shown(self.at_least)} to {_shown(self.at_most)}, got {value!r}"
        return f"must {self._rule()}, got {value}" if usable else f"must be {kind}, got {value!r}"

    def _rule(self) -> str:
        if self.above is not None and self.below is not None:
            return f"lie strictly between {_shown(self.above)} and {_shown(self.below)}"
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return "be " + " and ".join(f"{words} {_shown(end)}" for words, end in ends.items() if end is not None)


def plain_number(value: Any) -> Any:
    """The int or float that a NumPy number is; anything else as it is."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Number):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # Compared, not converted: an int may be larger than any float, and is then as useless as infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shown(end: float) -> str:
    """The end in digits, or as a power of two where digits would tell nobody anything."""
    if isinstance(end, int) and end > 1 << 16 and (end + 1).bit_count() == 1:
        return f"2**{end.bit_length()} - 1"
    return str(end)
