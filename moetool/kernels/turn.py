"""How matrices lie otherwise in llama.cpp's files than in transformers', there and back.

A turn is a word and its numbers, as a plan holds it: ["rope", heads]. None changes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROWS = ("rope",)  # those that put whole rows in another order


def turned(x: Tensor, turn: Sequence[Any]) -> Tensor:
    """A tensor as llama.cpp wants it."""
    word, *numbers = turn
    return _THERE[word](x, *numbers).contiguous()


def shape_of(shape: Sequence[int], turn: Sequence[Any]) -> tuple[int, ...]:
    """The shape of what `turned` gives."""
    word, *numbers = turn
    if word in ("same", "rope"):
        return tuple(shape)
    if word == "flat":
        return (prod(shape),)
    if word in ("keys", "values"):
        heads, keys, values = numbers
        return (heads, shape[1], keys) if word == "keys" else (heads, values, shape[1])
    halved = (*shape[:-1], shape[-1] // 2) if word.startswith("every") else tuple(shape)
    return (*halved[:-2], halved[-1], halved[-2]) if word.endswith("transposed") else halved


def shape_before(shape: Sequence[int], turn: Sequence[Any]) -> tuple[int, ...]:
    """The shape of what was turned, from that of (the first of) what it became."""
    word, *numbers = turn
    if word == "keys":
        heads, keys, values = numbers
        return (heads * (keys + values), shape[1])
    if word == "flat":
        return (1, *shape)
    swapped = (*shape[:-2], shape[-1], shape[-2]) if word.endswith("transposed") else tuple(shape)
    return (*swapped[:-1], 2 * swapped[-1]) if word.startswith("every") else swapped


def back(parts: Sequence[Tensor], turn: Sequence[Any]) -> Tensor:
    """What was turned, as it was: all that was made of one tensor goes in."""
    word, *numbers = turn
    return _BACK[word](parts, *numbers)


def _rope(x: Tensor, heads: int) -> Tensor:
    """Rows of each head: halves beside each other become pairs (rotated by neighbours, as Llama's
    own code does, not by halves).
    """
    return x.reshape(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _unrope(parts: Sequence[Tensor], heads: int) -> Tensor:
    (x,) = parts
    return x.reshape(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _keys(x: Tensor, heads: int, keys: int, values: int) -> Tensor:
    """Of the latent's up projection [heads * (keys + values), rank] the keys' part, transposed:
    [heads, rank, keys].
    """
    return x.reshape(heads, keys + values, -1)[:, :keys].transpose(1, 2)


def _values(x: Tensor, heads: int, keys: int, values: int) -> Tensor:
    """... and the values' part [heads, values, rank]."""
    return x.reshape(heads, keys + values, -1)[:, keys:]


def _latent(parts: Sequence[Tensor], heads: int, keys: int, values: int) -> Tensor:
    import torch

    k, v = parts
    return torch.cat([k.transpose(1, 2), v], 1).reshape(heads * (keys + values), -1)


def _every(x: Tensor, which: int) -> Tensor:
    """Of two that lie by turns along the last axis the first or the second one; a matrix
    [..., in, 2 * out] is transposed then: [..., out, in].
    """
    return x[..., which::2]


def _zipped(parts: Sequence[Tensor], _: int = 0) -> Tensor:
    import torch

    return torch.stack(list(parts), -1).flatten(-2)


def _every_turned(x: Tensor, which: int) -> Tensor:
    return x[..., which::2].transpose(-1, -2)


def _zipped_turned(parts: Sequence[Tensor], _: int = 0) -> Tensor:
    return _zipped([p.transpose(-1, -2) for p in parts])


_THERE: dict[str, Callable[..., Tensor]] = {
    "same": lambda x: x,
    "flat": lambda x: x.reshape(-1),
    "transposed": lambda x: x.transpose(-1, -2),
    "rope": _rope,
    "keys": _keys,
    "values": _values,
    "every": _every,
    "every_transposed": _every_turned,
}
_BACK: dict[str, Callable[..., Tensor]] = {
    "same": lambda parts: parts[0],
    "flat": lambda parts: parts[0].reshape(1, -1),
    "transposed": lambda parts: parts[0].transpose(-1, -2),
    "rope": _unrope,
    "keys": _latent,
    "every": _zipped,
    "every_transposed": _zipped_turned,
}
