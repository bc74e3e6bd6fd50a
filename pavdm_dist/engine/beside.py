"""Decoding beside sampling in one process: in a thread of its own, on a GPU's stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from pavdm_dist.codecs.base import ChunkDecoder


class Beside:
    """Decodes one stream's chunks in order while others are sampled; use as a context manager.

    Args:
        decoder: of the stream; nobody else may use it meanwhile.
        device: where it computes.
        threads: intra-op threads of the CPU.
    """

    def __init__(self, decoder: ChunkDecoder, device: torch.device, threads: int) -> None:
        self._decoder, self._threads = decoder, threads
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # what the decoder was warmed on is there
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pavdm-decoder")

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """What was not begun is dropped; what was begun is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def decode(self, latents: Tensor) -> Callable[[], Tensor]:
        """Hands over the next chunk ``[C, c, h, w]``; what is returned waits for its frames."""
        future: Future[Tensor] = self._pool.submit(self._decoded, latents)
        return future.result

    def _decoded(self, latents: Tensor) -> Tensor:
        torch.set_num_threads(self._threads)  # a property of the calling thread
        if self._stream is None:
            return self._decoder.decode(latents)
        with torch.cuda.stream(self._stream):  # frames leave the device in it, too, and are there when it is over
            return self._decoder.decode(latents)
