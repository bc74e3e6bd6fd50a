"""Which of FFmpeg's decoders reads a stream: its own of VP8 and VP9 pass transparency over without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pavdm_dist.errors import MediaError

# Those of its decoders that show it.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def decoder_of(path: str | Path, stream: Any) -> Any:
    """The codec context that decodes a stream's packets: the stream's own, or one that sees its transparency.

    Args:
        path: of the file, for the message.
        stream: of PyAV, with a decoder.

    Raises:
        MediaError: the film is transparent, and this FFmpeg is built without the decoder for that.
    """
    import av

    own = stream.codec_context
    alpha = {name.lower(): value for name, value in stream.metadata.items()}.get("alpha_mode")
    if own.name not in _WITH_ALPHA or alpha != "1":
        return own
    name = _WITH_ALPHA[own.name]
    try:
        found: Any = av.CodecContext.create(name, "r")
    except av.codec.codec.UnknownCodecError as error:
        raise MediaError(
            f"{path}: its video is transparent, which this FFmpeg has no decoder for ({name}): convert it first"
        ) from error
    # What the container says of its colours.
    for attribute in ("color_primaries", "color_range", "color_trc", "colorspace"):
        setattr(found, attribute, getattr(own, attribute))
    return found
