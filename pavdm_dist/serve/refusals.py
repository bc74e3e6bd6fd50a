"""What a client is told when something cannot be: a status, and one sentence in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """A request that is not done.

    Args:
        status: of HTTP.
        message: one sentence.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def no_such_video(id: str) -> Refusal:
    return Refusal(404, f"there is no video {id[:100]!r}; it was never asked for here, or was deleted", "not_found")


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that refuses."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    said = message.encode(errors="replace").decode()  # it may show what a client sent, which need not be text
    return {"error": {"message": " ".join(said.split()), "type": kind, "param": None, "code": code}}
