"""Keeps secrets out of what is written for people or kept beside videos: messages, logs, settings, sidecars.

Applied where text leaves the package: the message of every :class:`~pavdm_dist.errors.PAVDMError`, the log of the
command line, its tracebacks, and settings that are printed or stored (:func:`~pavdm_dist.merging.to_dict`).
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
_USER_OF_URL = re.compile(r"(?<=://)[^\s/?#]*@")
_QUERY_OF_URL = re.compile(
    r"([?&][^=&\s]*(?:token|key|secret|signature|sig|password|credential|auth)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=\bBearer )[^\s'\",]+")
_SECRET_VARIABLES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
# Shorter values of such variables are switches, or would be found in innocent words.
_SHORTEST = 12


def hide_secrets(text: str) -> str:
    """``text`` with ``***`` for users and passwords of URLs, signed query parameters, tokens of the hub, and values of
    environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and not value.startswith("/") and _SECRET_VARIABLES.search(name):
            text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _QUERY_OF_URL.sub(rf"\1{HIDDEN}", _USER_OF_URL.sub(f"{HIDDEN}@", text))
    return _TOKENS.sub(HIDDEN, text)
