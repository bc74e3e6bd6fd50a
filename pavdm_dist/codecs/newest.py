"""What was met lately, at constant memory: a farm of hundreds of thousands of shots asks for as many texts."""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED = 4096


class Newest:
    """The newest ``REMEMBERED`` texts of those that were met. Any thread may ask."""

    def __init__(self) -> None:
        self._met: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._met)

    def is_new(self, text: str) -> bool:
        """Whether a text is met for the first time, as far as is remembered; it is remembered from now on."""
        if text in self._met:
            return False
        self._met[text] = None
        if len(self._met) > REMEMBERED:
            self._met.popitem(last=False)
        return True
