"""From the colours of HDR and wide-gamut films to those of all others: BT.709 for a screen of SDR.

The formulas are those of BT.2100 (PQ and HLG), BT.2408 (white at 203 nits) and BT.1886 (what a screen of SDR shows): a
table of what code values mean, a product with a matrix, and a power back, so that a frame takes some milliseconds.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# FFmpeg's numbers of transfer curves and primaries.
PQ, HLG, LINEAR = 16, 18, 8
BT470M, FILM, BT2020, P3, DISPLAY_P3 = 4, 8, 9, 11, 12
# Curves that no screen of SDR shows as they are, and that nothing here knows: logarithmic ones, cinema's.
UNKNOWN_CURVES = {9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428"}
UNKNOWN_PRIMARIES = {10: "XYZ"}

_WHITE_NITS, _HLG_PEAK_NITS, _GAMMA = 203, 1000, 2.4
# From here on brighter light is rolled off, so that what is brighter than white keeps some of its shape.
_KNEE = 0.75
_D65, _C = (0.3127, 0.3290), (0.3100, 0.3160)
_BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_WIDE = {
    BT470M: ((0.670, 0.330), (0.210, 0.710), (0.140, 0.080)),  # NTSC of 1953
    FILM: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049)),  # behind Wratten's filters 25, 58 and 47
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: _P3,
    DISPLAY_P3: _P3,
}
# Primaries whose white is not D65.
_WHITES = {BT470M: _C, FILM: _C}
# Bradford's: from XYZ to the responses of three receptors, which a change of white scales.
_RECEPTORS = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def needs_conversion(transfer: int, primaries: int) -> bool:
    """Whether pixels mean something else than those of BT.709; the primaries of BT.601 are near enough."""
    return transfer in (PQ, HLG, LINEAR) or primaries in _WIDE


def converted(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Pixels as a screen of SDR shows them.

    Args:
        pixels: uint16 ``[H, W, 3]``, red, green and blue as they are coded, full range.
        transfer, primaries: FFmpeg's numbers.

    Returns:
        uint8 ``[H, W, 3]``, BT.709.
    """
    light = _light(transfer)[pixels]
    if transfer == HLG:  # the screen's part, which depends on how bright a pixel is as a whole
        light *= (light @ np.array([0.2627, 0.6780, 0.0593], np.float32))[..., None] ** np.float32(0.2)
        light *= np.float32(_HLG_PEAK_NITS / _WHITE_NITS)
    if primaries in _WIDE:
        light = light @ _to_bt709(primaries).T
    light = np.maximum(light, 0)
    if transfer in (PQ, HLG, LINEAR):
        bright = _KNEE + (1 - _KNEE) * -np.expm1((_KNEE - light) / (1 - _KNEE))
        light = np.where(light > _KNEE, bright, light)
    return np.round(np.minimum(light, 1) ** np.float32(1 / _GAMMA) * 255).astype(np.uint8)


@cache
def _light(transfer: int) -> np.ndarray:
    """Of every code value the light that it stands for, 1 = white."""
    code = np.arange(65536) / 65535
    if transfer == PQ:
        root = code ** (32 / 2523)
        light = (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        light *= 10_000 / _WHITE_NITS
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        light = code if transfer == LINEAR else code**_GAMMA
    return light.astype(np.float32)


@cache
def _to_bt709(primaries: int) -> np.ndarray:
    xyz = _to_xyz(_WIDE[primaries], _WHITES.get(primaries, _D65))
    if primaries in _WHITES:  # white stays white
        responses, wanted = _RECEPTORS @ xyz.sum(1), _RECEPTORS @ _to_xyz(_BT709, _D65).sum(1)
        xyz = np.linalg.inv(_RECEPTORS) @ np.diag(wanted / responses) @ _RECEPTORS @ xyz
    return (np.linalg.inv(_to_xyz(_BT709, _D65)) @ xyz).astype(np.float32)


def _to_xyz(corners: tuple[tuple[float, float], ...], white: tuple[float, float]) -> np.ndarray:
    """Red, green and blue of these chromaticities, together a white of that one -> CIE XYZ."""
    x, y = np.array([*corners, white]).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
