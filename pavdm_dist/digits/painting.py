"""Scenes drawn on a device, many at a time: what :func:`~pavdm_dist.digits.world.render` draws, up to rounding.

One CPU core draws some ten clips a second, a GPU takes thousands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.digits.handwriting import load_glyphs
from pavdm_dist.digits.settings import COLOURS, GLYPH_CELLS, INK_EDGE, DigitWorld
from pavdm_dist.digits.world import MASK_ALPHA, Scene, positions
from pavdm_dist.models.devices import to_device


class Painter:
    """Draws scenes of one world.

    Args:
        world: whose sizes hold.
        device: where frames are made.

    Raises:
        ConfigError: scikit-learn is not installed.
    """

    def __init__(self, world: DigitWorld, device: torch.device | str = "cpu") -> None:
        self.world, self.device = world, torch.device(device)
        self._glyphs = torch.from_numpy(load_glyphs()[0]).to(self.device)
        self._colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def paint(self, scenes: Sequence[Scene], starts: Sequence[int], num_frames: int) -> tuple[Tensor, Tensor]:
        """Each scene's frames from its start on, and where any digit covers them.

        Args:
            scenes: n of them, of this world.
            starts: the first frame of each.
            num_frames: t.

        Returns:
            Frames ``[n, t, size, size, 3]``, uint8 RGB, and foreground ``[n, t, size, size]``, bool.
        """
        most = max(len(scene.digits) for scene in scenes)
        shape = (len(scenes), most)
        images, colours = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        wraps, there = np.zeros(shape, bool), np.zeros(shape, np.float32)
        corners = np.zeros((*shape, num_frames, 2))
        names = list(COLOURS)
        for row, (scene, start) in enumerate(zip(scenes, starts, strict=True)):
            for column, digit in enumerate(scene.digits):
                images[row, column], colours[row, column] = digit.image, names.index(digit.colour)
                wraps[row, column], there[row, column] = digit.motion == "drifting", 1
                corners[row, column] = positions(digit, start, num_frames, self.world)
        ink = self._ink(self._put(images), self._put(corners.astype(np.float32)), self._put(wraps))
        edge = ((ink - INK_EDGE[0]) / (INK_EDGE[1] - INK_EDGE[0])).clamp(0, 1)
        alpha = edge * edge * (3 - 2 * edge) * self._put(there)[:, :, None, None, None]
        frames = self._backgrounds(scenes)[:, None].expand(-1, num_frames, -1, -1, -1)
        inks = self._colours[self._put(colours)]
        for column in range(most):  # the last is on top
            frames = frames + alpha[:, column, ..., None] * (inks[:, column, None, None, None] - frames)
        return (frames + 0.5).to(torch.uint8), (alpha > MASK_ALPHA).any(dim=1)

    def _put(self, values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)

    def _ink(self, images: Tensor, corners: Tensor, wraps: Tensor) -> Tensor:
        """Interpolated ink ``[n, d, t, size, size]``."""
        size, cell = self.world.size, self.world.cell
        offsets = torch.arange(size, device=self.device)[:, None] - corners[:, :, :, None]
        margin = (size - GLYPH_CELLS * cell) / 2
        wrapped = (offsets + margin).remainder(size) - margin
        offsets = torch.where(wraps[:, :, None, None, None], wrapped, offsets)
        places = torch.arange(GLYPH_CELLS, device=self.device)
        x = ((offsets[..., None] + 0.5) / cell - 0.5 - places).abs()  # [n, d, t, size, 2, 8]
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
        return (weights[..., 0, :] @ self._glyphs[images][:, :, None]) @ weights[..., 1, :].mT

    def _backgrounds(self, scenes: Sequence[Scene]) -> Tensor:
        """``[n, size, size, 3]``, 0..255."""
        ramp = (torch.arange(self.world.size, device=self.device) + 0.5) / self.world.size - 0.5
        slopes = self._put(np.array([scene.gradient for scene in scenes], np.float32))
        tints = self._put(np.array([scene.background for scene in scenes], np.float32))
        shade = slopes[:, 0, None, None] * ramp[:, None] + slopes[:, 1, None, None] * ramp
        return (tints[:, None, None] + shade[..., None]).clamp(0, 255)
