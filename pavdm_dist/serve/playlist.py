"""The segments of a video that grows, by its playlist: a look reads what is new, however long the video is by now."""

from __future__ import annotations

from dataclasses import dataclass

from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.segments import ENTRY, INPUT, PLAYLIST
from pavdm_dist.io.storage import join, open_read


@dataclass(frozen=True)
class Listed:
    """A closed segment.

    Attributes:
        path: of the mp4.
        behind: the chunk behind its last one.
        short: it ends inside of its group: a writer that goes on with the video makes the whole group anew.
    """

    path: str
    behind: int
    short: bool


class Playlist:
    """The closed segments of an unfinished video. One thread looks, others may ask meanwhile.

    Args:
        output: the mp4 that it becomes.
    """

    def __init__(self, output: str) -> None:
        self._parts = parts_folder(output)
        self._segments: dict[int, Listed] = {}  # by the chunk that each begins with; the input's is -1
        self._last, self._at = b"", 0  # the last entry, and the byte that it begins at

    def look(self) -> bool:
        """Reads what was added since the last look, or all of it where that is no longer the same.

        Returns:
            Whether anything is new.

        Raises:
            OSError: it cannot be read. That there is none is no error: what was known stays so.
        """
        try:
            with open_read(join(self._parts, PLAYLIST)) as file:
                file.seek(self._at)
                text = file.read()
                if text == self._last:
                    return False
                is_longer = text.startswith(self._last)
                if not is_longer:  # another writer went on, and dropped what was last
                    file.seek(0)
                    text, self._at = file.read(), 0
        except FileNotFoundError:
            return False
        segments = self._segments if is_longer else {}
        entries = list(ENTRY.finditer(text.decode("ascii", "replace")))
        for mark, name, first, last, _ in (entry.groups() for entry in entries):
            begins, behind = (-1, 0) if name == INPUT else (int(first), int(last) + 1)
            segments[begins] = Listed(join(self._parts, name), behind, bool(mark))
        self._segments = segments
        self._last = entries[-1][0].encode() if entries else b""
        self._at += entries[-1].start() if entries else 0
        return True

    def next(self, chunk: int, short: bool) -> Listed | None:
        """The segment that comes next, if it is there.

        Args:
            chunk: that it begins with; -1 = the input, where the video has it in front of its chunks. That is written
                before any chunk is: a playlist that has chunks without it shows that there is none.
            short: whether it may be a short one.
        """
        found = self._segments.get(chunk) or (self._segments.get(0) if chunk < 0 else None)
        return None if found is None or (found.short and not short) else found
