"""Texts that end an answer, found as it comes."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        """Starts before the text; empty strings stop nothing."""
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str, *, last: bool = False) -> tuple[str, bool]:
        """Returns the text that can be shown now, and whether a stop string follows it."""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self._held = ""
            return held[: min(places)], True
        keep = (
            0 if last else max(map(self._begun, self._stops, [held] * len(self._stops)), default=0)
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    @staticmethod
    def _begun(stop: str, text: str) -> int:
        """How much of `stop` the text ends with."""
        sizes = range(min(len(stop) - 1, len(text)), 0, -1)
        return next((size for size in sizes if text.endswith(stop[:size])), 0)
