"""Codes of -1, 0 and 1, four a byte along the input: packed, unpacked, and multiplied with.

A byte holds code + 1 of four neighbours, the first in its lowest bits.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
CODES = 4  # a byte
# As wide as four of a dtype: selecting four at once costs a fifth of selecting rows of four.
_WIDE = {
    torch.int8: torch.int32,
    torch.bfloat16: torch.int64,
    torch.float16: torch.int64,
    torch.float32: torch.complex128,
}
_LIMIT = 127  # of int8


def packed(codes: Tensor) -> Tensor:
    """[out, in] of -1, 0, 1 -> uint8 [out, in / 4]."""
    four = (codes + 1).to(torch.uint8).view(*codes.shape[:-1], -1, CODES)
    made = four[..., 0].clone()
    for i in range(1, CODES):
        made |= four[..., i] << 2 * i
    return made


def unpacked(bytes_: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [out, in / 4] -> codes [out, in] of a dtype."""
    if dtype not in _WIDE:
        return unpacked(bytes_, torch.int8).to(dtype)
    four = _table(dtype, bytes_.device).index_select(0, bytes_.flatten().int())
    return four.view(dtype).view(len(bytes_), -1)


def _rows(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 4]: the four codes of every byte."""
    every = torch.arange(256, device=device)
    return torch.stack([(every >> 2 * i & 3) - 1 for i in range(CODES)], -1).to(dtype)


_CPU = torch.device("cpu")
# a plain dict: compilers look through it, and through no cached function
_ROWS = {(dtype, _CPU): _rows(dtype, _CPU) for dtype in _WIDE}


def _held(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`_rows`, made once."""
    if (dtype, device) not in _ROWS:
        _ROWS[dtype, device] = _rows(dtype, device)
    return _ROWS[dtype, device]


def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: all four codes of a byte as one number."""
    return _held(dtype, device).view(_WIDE[dtype]).flatten()


class _Product(torch.autograd.Function):
    """x times codes; the codes are unpacked again on the way back instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bytes_: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(bytes_)
        return x @ unpacked(bytes_, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (bytes_,) = ctx.saved_tensors
        return grad @ unpacked(bytes_, grad.dtype), None


def product(x: Tensor, bytes_: Tensor) -> Tensor:
    """x [tokens, in] times the codes transposed -> [tokens, out]."""
    if x.requires_grad and torch.is_grad_enabled():
        made: Tensor = _Product.apply(x, bytes_)  # type: ignore[no-untyped-call]
        return made
    return _one(x, bytes_) if len(x) == 1 else x @ unpacked(bytes_, x.dtype).T


def _one(x: Tensor, bytes_: Tensor) -> Tensor:
    """A single token: for every four inputs all 256 sums they can give, of which each byte picks
    one. Less memory goes through than unpacked codes take.
    """
    four = x.float().view(-1, CODES)
    sums = (four @ _held(torch.float32, x.device).T).flatten()
    first = torch.arange(0, len(sums), 256, dtype=torch.int32, device=x.device)
    found = sums.index_select(0, (bytes_.int() + first).flatten())
    return found.view(len(bytes_), -1).sum(1).to(x.dtype)[None]


def rounded_product(x: Tensor, bytes_: Tensor) -> Tensor:
    """As `product`, of activations rounded to int8 with one scale a token (absmax): sums of whole
    numbers, exact on every road. The gradient is that of activations that are not rounded.
    """
    step = x.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LIMIT
    whole = (x.detach().float() / step).round_().clamp_(-_LIMIT, _LIMIT)
    if x.device.type == "cpu":
        made = torch._int_mm(whole.to(torch.int8), unpacked(bytes_, torch.int8).T).float()
    else:
        made = whole @ unpacked(bytes_, torch.float32).T
    made = (made * step).to(x.dtype)
    if x.requires_grad and torch.is_grad_enabled():
        through = product(x, bytes_)
        made = through + (made - through).detach()
    return made


def rounded(x: Tensor) -> Tensor:
    """Activations as int8 with one scale a token gives them back; the gradient passes through."""
    step = x.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LIMIT
    made = ((x.detach().float() / step).round_().clamp_(-_LIMIT, _LIMIT) * step).to(x.dtype)
    return x + (made - x).detach() if x.requires_grad and torch.is_grad_enabled() else made
