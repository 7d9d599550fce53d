"""Integers with a scale and a zero point for some neighbours, in the arithmetic of
compressed-tensors (quantization/utils/helpers.py, calculate_qparams): that of the weights' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shifted:
    """codes uint8 [out, in], scales [out, groups], and the code that is zero, uint8 [out, groups]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def nearest(matrix: Tensor, bits: int, group: int, scale: torch.dtype) -> Shifted:
    """[out, in] -> the nearest of 2^bits levels between the least and the largest of `group`
    neighbours (0: of a row), zero among them.
    """
    half = 1 << (bits - 1)
    groups = matrix.reshape(len(matrix), -1, group or matrix.shape[1])
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / (2 * half - 1)
    zeros = (-half - low / scales).clamp_(-half, half - 1).nan_to_num_(0.0).round_()
    scales = torch.where(
        scales == 0, torch.full_like(scales, torch.finfo(scales.dtype).eps), scales
    )
    scaled = (groups / scales[..., None]).add_(zeros[..., None]).clamp_(-half, half - 1).round_()
    codes = scaled.add_(half).to(torch.uint8).reshape(matrix.shape)
    return Shifted(codes, scales.to(scale), zeros.add(half).to(torch.uint8))


def values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(code - zero) * scale, float32 [out, in]."""
    groups = codes.reshape(*scales.shape, -1).float().sub_(zeros[..., None].float())
    return groups.mul_(scales.float()[..., None]).reshape(codes.shape)
