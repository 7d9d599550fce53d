"""nvfp4: E2M1 values, an E4M3 scale for 16 neighbours, and one float32 for the matrix by which the
scales are divided; in the arithmetic of compressed-tensors (generate_gparam, calculate_qparams).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetool.kernels import grid, packing, rounding
from moetool.kernels.blockscale import FP8_LARGEST

Tensor = torch.Tensor
GROUP = 16
_FP4_LARGEST = 6.0
_LEAST = 0.125  # the scale of a group of zeros


def encode(matrix: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
    """[out, in] -> (codes uint8 [out, in / 2], scales E4M3 [out, in / 16], global scale [1]). The
    largest magnitude of the matrix and of `others`, with which it shares the last, is at 448 * 6.
    """
    whole = min(
        (_whole(m) for m in (matrix, *others)), key=lambda t: 0.0 if t.is_meta else float(t)
    )
    groups = matrix.reshape(len(matrix), -1, GROUP)
    scales = whole * (groups.abs().amax(-1) / _FP4_LARGEST)
    stored = scales.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    held = stored.float()
    held = torch.where(held == 0, torch.full_like(held, _LEAST), held)
    scaled = groups / (held / whole)[..., None]
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    rounding.snap(scaled.float().reshape(matrix.shape), grid.e2m1(GROUP, "F32"), codes)
    return [packing.e2m1(codes), held.to(torch.float8_e4m3fn), whole]


def decode(packed: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    """The inverse, float32 [out, in]."""
    values = packing.e2m1_values(packed)
    factors = (scales.float() / whole)[..., None]
    return values.view(*scales.shape, GROUP).mul_(factors).view(values.shape)


def _whole(matrix: Tensor) -> Tensor:
    """The global scale of one matrix, float32 [1]."""
    most = matrix.abs().amax().clamp(min=torch.finfo(matrix.dtype).tiny)
    scale = (FP8_LARGEST * _FP4_LARGEST / most).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    return scale.float().reshape(1)
