"""Matrices of -1, 0 and 1 times one scale, four codes a byte along the output dimension
(transformers' integrations/bitnet.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
_CODES = 4  # a byte


@dataclass(frozen=True)
class Ternary:
    """`codes` int8 of -1, 0, 1; `scale` a float32 number; `error`: what rounding lost, relative to
    the matrix (Frobenius); `exact`: whether every value was one of -s, 0, s already.
    """

    codes: Tensor
    scale: Tensor
    error: float
    exact: bool


def rounded(matrix: Tensor) -> Ternary:
    """[out, in] -> the nearest of -1, 0, 1 times the mean magnitude (arXiv 2402.17764); a matrix
    that already is ternary keeps its own scale, and so its values.
    """
    wide = matrix.float()
    size = wide.abs()
    most = size.max() if size.numel() else wide.new_zeros(())
    exact = bool(((size == 0) | (size == most)).all()) if not matrix.is_meta else True
    scale = most if exact else size.mean().clamp(min=1e-5)
    codes = (wide / scale.clamp(min=1e-38)).round_().clamp_(-1, 1)
    if matrix.is_meta:
        return Ternary(codes.to(torch.int8), scale, 0.0, True)
    lost = (codes * scale - wide).norm() / wide.norm().clamp(min=1e-38)
    return Ternary(codes.to(torch.int8), scale, float(lost), exact)


def packed(codes: Tensor) -> Tensor:
    """int8 [out, in] -> uint8 [out / 4, in]: the i-th quarter of the rows in bits 2i and 2i + 1."""
    quarters = (codes + 1).to(torch.uint8).reshape(_CODES, -1, codes.shape[1])
    made = quarters[0].clone()
    for i in range(1, _CODES):
        made |= quarters[i] << 2 * i
    return made


def unpacked(bytes_: Tensor) -> Tensor:
    """The inverse of `packed`, in float32."""
    quarters = [(bytes_ >> 2 * i) & 3 for i in range(_CODES)]
    return torch.cat(quarters).float() - 1.0


def absmean(matrix: Tensor, group: int = 0) -> Ternary:
    """[out, in] -> codes under the mean magnitude of the matrix, or of every `group` inputs of a
    row, as BitNet and MoTE train them (arXiv 2402.17764, 2506.14435; transformers' WeightQuant
    gives the same codes). `scale` [1] or [out, in / group], rounded to float16, so that formats
    that store it so hold it exactly.
    """
    wide = matrix.float()
    rows, (codes, scale) = _rows(wide, group), _absmean(wide, group)
    if matrix.is_meta:
        return Ternary(codes.to(torch.int8).reshape(wide.shape), scale, 0.0, False)
    lost = (codes * scale - rows).norm() / wide.norm().clamp(min=1e-38)
    shape = (wide.shape[0], -1) if group else (1,)
    small = codes.to(torch.int8).reshape(wide.shape)
    return Ternary(small, scale.reshape(shape), float(lost), False)


def _rows(matrix: Tensor, group: int) -> Tensor:
    """[out, in], or with a group [out, in / group, group]: what shares a scale, last."""
    return matrix.reshape(len(matrix), -1, group) if group else matrix


def _absmean(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes in float32 and scales, so shaped that codes times scales is the matrix in `_rows`."""
    rows = _rows(matrix, group)
    size = rows.abs()
    mean = size.mean(-1, keepdim=True) if group else size.mean()
    mean = mean.clamp(min=1e-5)
    return (rows * (1.0 / mean)).round_().clamp_(-1, 1), mean.half().float()


class _Straight(torch.autograd.Function):
    """A matrix rounded on the way there, as it is on the way back."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, group: int) -> Tensor:
        codes, scale = _absmean(master.float(), group)
        return (codes * scale).view(master.shape).to(master.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight(master: Tensor, group: int = 0) -> Tensor:
    """The values of `absmean` for a matrix [out, in] that is trained in full: its gradient is that
    of the rounded one (straight-through; transformers' WeightQuant).
    """
    made: Tensor = _Straight.apply(master, group)  # type: ignore[no-untyped-call]
    return made


def master(codes: Tensor, scale: Tensor, group: int = 0) -> Tensor:
    """A matrix [out, in] in float32 that `absmean` rounds to these codes and scales (which are
    exact in float16): where a code is not 0, larger by what its zeros take from the mean.
    """
    rows = _rows(codes.float(), group)
    shares = rows.abs().mean(-1, keepdim=True) if group else rows.abs().mean()
    made = rows * (scale[..., None] if group else scale) / shares.clamp(min=1e-38)
    return made.view(codes.shape)
