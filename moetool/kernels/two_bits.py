"""Codes of -1, 0 and 1, four a byte along the input: packed, unpacked, and multiplied with.

A byte holds code + 1 of four neighbours, the first in its lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
_TINY = 1e-30
_NEAR = 2**18  # codes that are unpacked at a time
_LOW = 0x03030303  # the lowest code of each of four bytes
# Numbers of 24 bits as three digits from -128 to 127: what is added, and turned, to have them.
_HALVES, _MOST, _DIGITS = 0x8080, 127 * 2**16, 3
_CPU = torch.device("cpu")  # said: this module may be imported while a model is built on another
# tensors, for plain numbers cost more
_SHIFTS = {n: torch.tensor(n, dtype=torch.int32, device=_CPU) for n in (2, 4, 6, 8, 16)}
# Processors that multiply bytes and lose nothing of their sums: AVX2 alone is none of them.
_BYTES = torch._C._has_mkldnn and bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


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
    def forward(ctx: Any, x: Tensor, bytes_: Tensor, rounded: bool) -> Tensor:
        ctx.save_for_backward(bytes_)
        if rounded:
            return _rounded_product(x, bytes_)
        in_digits = _in_digits(x, bytes_)
        return _digits_product(Digits.of(x), bytes_) if in_digits else _product(x, bytes_)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bytes_,) = ctx.saved_tensors
        return grad @ unpacked(bytes_, grad.dtype), None, None


class Digits(NamedTuple):
    """Tokens as whole numbers of 24 bits: `digits` int8 [in, 3 * tokens], in the order of
    `_by_place`; `step`: what 1 means for each token [tokens].
    """

    digits: Tensor
    step: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Digits:
        """Of x [tokens, in], float32."""
        tokens, width = x.shape
        step = _step(x, _MOST).view(-1)
        whole = x.new_empty(CODES, width // CODES, tokens)
        torch.div(x.view(tokens, -1, CODES).permute(2, 1, 0), step, out=whole)
        turned = whole.round_().int().add_(_HALVES).bitwise_xor_(_HALVES).view(width, tokens)
        made = torch.empty(width, _DIGITS, tokens, dtype=torch.int8)
        for i in range(_DIGITS):
            made[:, i] = turned >> _SHIFTS[8 * i] if i else turned
        return cls(made.view(width, -1), step)


class Once:
    """The digits of the input that several matrices see, made once."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._made: Digits | None = None

    def __call__(self, x: Tensor) -> Digits:
        if self._made is None or x is not self._of:
            self._of, self._made = x, Digits.of(x)
        return self._made


def product(
    x: Tensor, bytes_: Tensor, scale: Tensor, rounded: bool = False, once: Once | None = None
) -> Tensor:
    """x [tokens, in] times the codes transposed, times `scale` [1] -> [tokens, out]. `rounded`: x
    as int8 with one scale a token (absmax); its gradient is that of x unrounded. `once`: shared by
    the products of one x.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        made: Tensor = _Product.apply(x, bytes_, rounded)  # type: ignore[no-untyped-call]
        return made * scale.to(x.dtype)
    if rounded:
        return _rounded_product(x, bytes_, scale)
    if _in_digits(x, bytes_):
        return _digits_product((once or Digits.of)(x), bytes_, scale)
    if x.shape[-1] < len(bytes_):
        return _product(x * scale.to(x.dtype), bytes_)
    return _product(x, bytes_) * scale.to(x.dtype)


def _product(x: Tensor, bytes_: Tensor) -> Tensor:
    """A few rows of codes at a time, which are still in the cache when they are multiplied with."""
    if torch.compiler.is_compiling():
        return x @ unpacked(bytes_, x.dtype).T
    multiply = _sums_of(x) if len(x) == 1 else partial(_plain, x)
    made = x.new_empty(len(bytes_), len(x))
    rows = max(1, _NEAR // x.shape[-1])
    for first in range(0, len(bytes_), rows):
        those = slice(first, first + rows)
        multiply(bytes_[those], made[those])
    return made.T


def _in_digits(x: Tensor, bytes_: Tensor) -> bool:
    """Whether tokens can be multiplied as digits, and that is faster."""
    if torch.compiler.is_compiling() or not _BYTES or x.device.type != "cpu":
        return False
    words = bytes_.shape[-1] % CODES == 0 and bytes_.is_contiguous()
    return words and x.dtype == torch.float32 and len(x) > 0


def _digits_product(x: Digits, bytes_: Tensor, scale: Tensor | None = None) -> Tensor:
    """Digits are multiplied exactly, so all that is lost is what lies below 2^-24 of a token's
    largest number: less than sums of floats lose, or, where one number is far above all others,
    two or three times as much.
    """
    many = torch._int_mm(_by_place(bytes_), x.digits).float()
    low, middle, high = many.view(len(bytes_), _DIGITS, -1).unbind(1)
    made = torch.add(low, middle, alpha=2**8).add_(high, alpha=2**16)
    return made.mul_(x.step if scale is None else x.step * scale).T


def _by_place(bytes_: Tensor) -> Tensor:
    """uint8 [out, in / 4] -> codes int8 [out, in]: all first ones of a byte, all second..."""
    words = bytes_.view(torch.int32)
    made = torch.empty(len(words), CODES, words.shape[1], dtype=torch.int32)
    for i in range(CODES):
        torch.bitwise_and(words >> _SHIFTS[2 * i] if i else words, _LOW, out=made[:, i])
    return made.view(torch.int8).view(len(words), -1).sub_(1)


def _plain(x: Tensor, bytes_: Tensor, out: Tensor) -> None:
    torch.mm(unpacked(bytes_, x.dtype), x.T, out=out)


def _sums_of(x: Tensor) -> Callable[[Tensor, Tensor], None]:
    """A single token: for every four inputs all 256 sums they can give, of which each byte picks
    one. Less goes through memory than unpacked codes take.
    """
    sums = (x.float().view(-1, CODES) @ _held(torch.float32, x.device).T).flatten()
    first = torch.arange(0, len(sums), 256, dtype=torch.int32, device=x.device)

    def multiply(bytes_: Tensor, out: Tensor) -> None:
        found = sums.index_select(0, (bytes_.int() + first).flatten())
        out.copy_(found.view(len(bytes_), -1).sum(1, keepdim=True))

    return multiply


def _rounded_product(x: Tensor, bytes_: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sums of whole numbers: exact, and on processors several times faster than those of floats."""
    step = _step(x)
    whole = (x.detach().float() / step).round()
    if x.device.type == "cpu":
        sums = torch._int_mm(whole.to(torch.int8), unpacked(bytes_, torch.int8).T)
    else:
        sums = whole @ unpacked(bytes_, torch.float32).T
    return (sums * (step if scale is None else step * scale)).to(x.dtype)


def _step(x: Tensor, most: int = _LIMIT) -> Tensor:
    """What 1 means for each token [tokens, 1], so that its largest number is `most`."""
    return x.detach().float().abs().amax(-1, keepdim=True).clamp(min=_TINY) / most


def rounded(x: Tensor) -> Tensor:
    """Activations as int8 with one scale a token give them back; the gradient passes through."""
    step = _step(x)
    made = ((x.detach().float() / step).round() * step).to(x.dtype)
    return x + (made - x).detach() if x.requires_grad and torch.is_grad_enabled() else made
