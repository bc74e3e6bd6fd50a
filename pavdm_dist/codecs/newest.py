"""What was met lately, at constant memory: a farm of hundreds of thousands of shots asks for as many texts."""

from __future__ import annotations

from collections import OrderedDict


class Newest:
    """The newest so many texts of those that were met. Any thread may ask.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._met: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._met)

    def is_new(self, text: str) -> bool:
        """Whether a text is met for the first time, as far as is remembered; it is remembered from now on."""
        if text in self._met:
            return False
        self._met[text] = None
        if len(self._met) > self._most:
            self._met.popitem(last=False)
        return True
