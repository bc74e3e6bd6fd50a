"""Exceptions whose message is meant for the person who typed the command.

Everything derived from :class:`PAVDMError` is shown as one sentence and ends the command with a
non-zero exit status. Any other exception is a fault of this package and keeps its traceback.
"""

from pavdm_dist.redaction import hide_secrets


class PAVDMError(Exception):
    """Base of the errors this package raises on purpose; their messages hold no secrets."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide_secrets(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(PAVDMError, ValueError):
    """A setting is impossible; the message names the field, its value and the nearest legal values."""


class TakenError(ConfigError):
    """Another process is writing what was asked for; it may be free later."""


class MediaError(ConfigError):
    """A video or latents file is missing, unreadable or unfit for its use."""


class UnreachableError(MediaError):
    """A video could not be read now: its storage did not answer, which says nothing of the video."""


class TraceError(MediaError):
    """When what was computed cannot be kept, which was only to be looked at; the videos are as they are without."""


class CheckpointError(ConfigError):
    """A checkpoint folder lacks a tensor, or holds one of the wrong size; the message names it."""


class VideoError(PAVDMError, RuntimeError):
    """One video cannot be finished: what was computed for it is unsound, or could not be decoded. Others go on."""


class StalledError(VideoError):
    """A video gave nothing for too long, though what computes it is well."""


class FailedVideosError(VideoError):
    """Of a command's videos some failed, all others are complete.

    Args:
        message: which, and why.
        count: how many failed.
    """

    def __init__(self, message: str, count: int = 1) -> None:
        super().__init__(message)
        self.count = count

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (*self.args, self.count)


class EngineError(PAVDMError, RuntimeError):
    """The distributed run ended: an actor died, a link timed out, or resources are missing."""


class ResourcesError(EngineError):
    """The cluster does not have, or not have free, what was asked for."""


def first_line(error: BaseException) -> str:
    """What a library says of an error, as a part of a sentence: its first line with words, else the error's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
