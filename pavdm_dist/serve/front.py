"""What the routes ask for, without HTTP: requests become shots, shots become what clients see."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, BinaryIO

from pavdm_dist.commands.sample import requests_of
from pavdm_dist.commands.videos import WantedVideo as Output
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import Shot
from pavdm_dist.io.storage import atomic_write, join, remove
from pavdm_dist.serve import records
from pavdm_dist.serve.asked import created_at, keep_time
from pavdm_dist.serve.fragments import mime_type
from pavdm_dist.serve.front_desk import FrontDesk
from pavdm_dist.serve.playlist import Playlist
from pavdm_dist.serve.refusals import no_such_video
from pavdm_dist.serve.request_fields import check_picture, check_text, new_id, shot_of, suffix_of
from pavdm_dist.serve.tokens import is_same
from pavdm_dist.values.fields import show

# Times of requests that are kept in memory.
_KEPT = 4096


class Front:
    """A desk with what clients see of it. Called from any thread.

    Args:
        desk: opened.

    Attributes:
        began_at: seconds since 1970.
    """

    def __init__(self, desk: FrontDesk) -> None:
        self.desk, self.began_at = desk, int(time.time())
        # A file each, which does not change.
        self._created_at = lru_cache(_KEPT)(self._asked_at)

    def create(self, fields: Mapping[str, Any], reference: BinaryIO | None) -> dict[str, Any]:
        """Takes a request for a video, and gives the video object. Decoding a reference takes memory: one at a time.

        Args:
            fields: see :func:`~pavdm_dist.serve.request_fields.shot_of`.
            reference: the picture or clip that it begins with.

        Raises:
            Refusal: there is no room for it.
            ConfigError: naming the field, its value and what is legal.
            OSError: the folder cannot be written.
        """
        id = new_id()
        folder = self.desk.tree.folder(id)
        path = None
        if reference is not None:
            path = join(folder, f"input{suffix_of(reference.read(16))}")
            reference.seek(0)
            check_picture(reference)
            reference.seek(0)
        shot = shot_of(id, fields, self.desk.model, path)
        if path is None:
            self.desk.check(shot)
        try:
            keep_time(self.desk.tree, id, int(time.time()))
            if path is not None and reference is not None:
                with atomic_write(path) as file:
                    shutil.copyfileobj(reference, file)
                self.desk.check(shot)
                self._decode(shot)
            self.desk.submit(shot)
        except BaseException as error:
            remove(folder)  # nothing was promised
            if isinstance(error, ConfigError):
                raise ConfigError(self.desk.tree.without_places(id, str(error))) from error
            raise
        return self.get(id)

    def get(self, id: str) -> dict[str, Any]:
        """A video object.

        Raises:
            Refusal: 404.
        """
        found = records.record(self.desk, self.desk.shot(id), self._created_at(id))
        if found is None:
            raise no_such_video(id)
        return found

    def list(self, limit: int, after: str | None, newest_first: bool) -> dict[str, Any]:
        """A page of video objects.

        Raises:
            Refusal: 404: there is no video ``after``.
        """
        shots = self.desk.shots()
        if newest_first:
            shots.reverse()
        if after is not None:
            place = next((place for place, shot in enumerate(shots) if shot.id == after), None)
            if place is None:
                raise no_such_video(after)
            shots = shots[place + 1 :]
        found: list[dict[str, Any]] = []
        for shot in shots:
            one = records.record(self.desk, shot, self._created_at(shot.id))
            found += [] if one is None else [one]
            if len(found) > limit:
                break
        page = found[:limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > limit,
        }

    def set_prompt(self, id: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Another prompt in mid-video.

        Raises:
            Refusal: 404; 409: it is not being rendered, or no chunk of it is left to be born.
            ConfigError: no prompt, no such chunk, or a text that the model cannot take.
        """
        text, from_chunk = fields.get("prompt"), fields.get("from_chunk", 0)
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"prompt={show(text)}: must be text")
        check_text("prompt", text)
        if isinstance(from_chunk, str):
            try:
                from_chunk = int(from_chunk)
            except ValueError as error:  # no number, or one of thousands of digits
                raise ConfigError(f"from_chunk={show(from_chunk)}: must be a whole number, 0 or more") from error
        self.desk.set_prompt(id, text, from_chunk)
        return self.timeline(id)

    def timeline(self, id: str) -> dict[str, Any]:
        """See :func:`pavdm_dist.serve.records.timeline`."""
        return records.timeline(self.desk, id)

    def mime(self, id: str) -> str:
        """What a browser must be told of a video of which something is there."""
        output = self.desk.tree.output(id)
        playlist = Playlist(output)
        playlist.look()
        first = playlist.next(-1, short=True)
        try:
            return mime_type(output if first is None else first.path)
        except FileNotFoundError:  # it has become complete meanwhile
            return mime_type(output)

    def health(self) -> dict[str, Any]:
        """Whether videos can be rendered, and how many wait."""
        desk, figures = self.desk, self.desk.figures
        return {
            "status": "closing" if desk.closing else "trouble" if desk.trouble else "ok",
            "model": desk.model,
            "trouble": desk.trouble,
            "renderers": int(figures["renderers"]),
            "queued": int(figures["waiting"]),
            "in_progress": int(figures["running"]),
        }

    @staticmethod
    def is_token(given: object, token: str) -> bool:
        return isinstance(given, str) and is_same(given, token)

    def _decode(self, shot: Shot) -> None:
        """Refuses a picture or clip that cannot be begun with, before the video is promised."""
        config, params = self.desk.kinds.config_of(shot, "-"), self.desk.kinds.kind_of(shot).params
        requests_of(config, [Output(shot.prompt, config.seed, "-")], params, self.desk.kinds.checkpoint)

    def _asked_at(self, id: str) -> int:
        found = created_at(self.desk.tree, id)
        return self.began_at if found is None else found  # asked for by a manifest
