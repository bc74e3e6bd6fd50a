"""Keeps secrets out of what is written for people or kept beside videos: messages, logs, settings, sidecars.

Applied where text leaves the package: the message of every :class:`~pavdm_dist.errors.PAVDMError`, the log of the
command line, its tracebacks, sidecars, and settings that are printed or stored (:mod:`pavdm_dist.values.merging`).
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# In front of the @ a container of Azure's is no user.
_USER_OF_URL = re.compile(r"(?<=://)(?<!\babfs://)(?<!\babfss://)(?<!\bwasb://)(?<!\bwasbs://)[^\s/?#]*@")
_SECRET_KEY = (
    r"[?&](?:(?:[\w-]*[-_])?(?:token|secret|password|passwd|signature|credentials?|api[-_]?key|access[-_]?key)"
    r"|sig|pwd|key|auth|authorization|awsaccesskeyid)="
)
_QUERY_OF_URL = re.compile(rf"({_SECRET_KEY})[^&#\s'\"]+", re.IGNORECASE)
_LEFT_OUT = re.compile(rf"://{re.escape(HIDDEN)}@|{_SECRET_KEY}{re.escape(HIDDEN)}", re.IGNORECASE)
# Tokens of the hub are 34 letters and digits behind their prefix.
_HUB_TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{34}\b")
_AUTHORIZATION = re.compile(r"(\bauthorization\b['\"]?\s*[:=]\s*['\"]?(?:[a-z]+ )?)[^\s'\",]+", re.IGNORECASE)
_BEARER = re.compile(r"(?<=\bBearer )[\w.~+/=-]{16,}")
_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD)(?:_|$)|(?:^|_|API|ACCESS|SECRET|PRIVATE)KEY(?:_|$)", re.IGNORECASE
)
# Variables that say where a secret lies, or what it is called.
_NAME_OF_PLACE = re.compile(r"_(?:PATH|FILE|DIR|NAME|URL|URI|ID|PROFILE|TYPE)$", re.IGNORECASE)
# Shorter values of such variables are switches, or would be found in innocent words; so would one word of letters.
_SHORTEST, _LONG = 12, 20


def hide_secrets(text: str) -> str:
    """``text`` with ``***`` for what :func:`hide_in_urls` hides, tokens of the hub and of ``Authorization`` headers,
    and whole values of environment variables that are named like secrets and look like some."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _NAME_OF_PLACE.search(name) and _is_random(value) and value in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", HIDDEN, text)
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", hide_in_urls(text))
    return _BEARER.sub(HIDDEN, _HUB_TOKEN.sub(HIDDEN, text))


def hide_in_urls(text: str) -> str:
    """``text`` with ``***`` for users and passwords of URLs, and for parameters that sign or open them."""
    if "://" not in text:
        return text
    return _QUERY_OF_URL.sub(rf"\1{HIDDEN}", _USER_OF_URL.sub(f"{HIDDEN}@", text))


def is_redacted(text: str) -> bool:
    """Whether it is an address that :func:`hide_in_urls` took something out of, which cannot be opened any more."""
    return "://" in text and _LEFT_OUT.search(text) is not None


def _is_random(value: str) -> bool:
    if len(value) < _SHORTEST or value.startswith(("/", "./", "../", "~")):
        return False
    kinds = sum(any(map(kind, value)) for kind in (str.islower, str.isupper, str.isdigit))
    return kinds > 1 or len(value) >= _LONG
