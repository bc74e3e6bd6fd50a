"""What a hub, a mirror of one or a proxy in front of it answers, as one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pavdm_dist.errors import CheckpointError, PAVDMError
from pavdm_dist.models.nearby import near_name

# What a disk says that cannot keep what was fetched.
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG,
}  # fmt: skip
_TOKEN = "HF_TOKEN, or `hf auth login`, opens private and gated ones"
_AGAIN = "HF_HUB_OFFLINE=1 makes do with what was fetched before"


@contextmanager
def hub_errors(model: str, revision: str | None, offline: str | None) -> Iterator[None]:
    """Turns what the hub's library raises inside into one sentence.

    Args:
        model: the hub id.
        revision: of it.
        offline: where nothing may be fetched, what that means for a file that is not here.

    Raises:
        CheckpointError: instead of anything that is not this package's own.
    """
    try:
        yield
    except PAVDMError:
        raise
    except Exception as error:  # the transports below the library have kinds of their own, not all of them OSError
        raise CheckpointError(_sentence(error, model, revision, offline)) from error


def _sentence(error: BaseException, model: str, revision: str | None, offline: str | None) -> str:
    from huggingface_hub import constants, errors

    if offline and isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return f"model={model!r}: some of it is {offline}"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # that there is no copy either is the least of it
    hub, about = constants.ENDPOINT, f"model={model!r}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"revision={revision}: {about} has no such branch, tag or commit at {hub}"
    if isinstance(error, errors.GatedRepoError):
        return f"{about} is gated: ask for access at {hub}/{model}; {_TOKEN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        known = f"{status}, {hub} knows no such repository, or not for whom it is asked by; {_TOKEN}"
        return f"{about} is no folder here and no hub id: {known}{near_name(model)}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{about} cannot be kept in the hub's cache {constants.HF_HUB_CACHE}: {error.strerror}"
    if isinstance(error, errors.FileMetadataError):
        return f"{about}: what answers at {hub} is no hub, but perhaps a proxy or a login page ({reason})"
    if status in (401, 403):
        return f"{about}: {hub} refuses access ({status}); is the token good? {_TOKEN}"
    if status == 429:
        return f"{about}: {hub} is asked too often (429): wait, or give a token (HF_TOKEN); {_AGAIN}"
    if status is not None and status >= 500:
        return f"{about}: {hub} is out of order ({status}): try again later; {_AGAIN}"
    return f"{about} cannot be fetched from {hub} ({reason}); {_AGAIN}, HF_ENDPOINT names another hub"
