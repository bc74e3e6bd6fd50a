"""How far the shots of a farm are, whoever wrote what there is of them."""

from __future__ import annotations


class Reached:
    """New frames behind which nothing is left to do here. Not guarded against several threads.

    Attributes:
        frames: of all shots together; one that has ended counts in full, however it did.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._unfinished: dict[str, int] = {}  # by shot, what of it is among them

    def begin(self, id: str, before: int) -> None:
        """A shot goes on behind so many frames: more than it had where others wrote some, fewer where it lost some."""
        self.frames += before - self._unfinished.get(id, 0)
        self._unfinished[id] = before

    def add(self, id: str, frames: int) -> None:
        """So many more of a shot are written."""
        self.begin(id, self._unfinished.get(id, 0) + frames)

    def end(self, id: str, whole: int) -> None:
        """Nothing is left to do of a shot of so many frames."""
        self.begin(id, whole)
        del self._unfinished[id]
