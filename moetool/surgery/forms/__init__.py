"""How a matrix is stored: one file a form, found by itself.

`seen` asks every form what it knows in a checkpoint; `decoded` and `encoded` stand before and
behind every operation that computes. Nothing here imports torch before a matrix is decoded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from math import prod
from typing import TYPE_CHECKING, Any

from moetool import discover
from moetool.errors import MoetoolError, UsageError, did_you_mean
from moetool.kernels.grid import Grid
from moetool.surgery import groups
from moetool.surgery.forms.form import Config, Form, Format, Params, Read, Recognised, Written
from moetool.surgery.inside import HELD
from moetool.surgery.spec import Piece, Shape, Stored, Target, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Form",
    "Format",
    "Grid",
    "Known",
    "Recognised",
    "Spelled",
    "Written",
    "asked",
    "count",
    "decoded",
    "encoded",
    "formats",
    "forms",
    "lies_plain",
    "named",
    "seen",
    "settled",
    "split",
    "weights",
]


# Of compressed-tensors, fp8 in blocks and bitsandbytes; and of mxfp4. No family has such names.
_PARTS = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_shape",
          ".weight_zero_point", ".weight_global_scale", ".SCB", ".weight_format",
          ".absmax")  # fmt: skip
_PAIR = ("_blocks", "_scales")


@dataclass(frozen=True)
class Known:
    """A checkpoint's tensors under the names and with the shapes that its family knows, the config
    as one reads it who knows nothing of forms, and for each form what that config no longer says.
    """

    tensors: dict[str, Stored]
    config: Config
    told: dict[str, Config]


@lru_cache(maxsize=1)
def forms() -> dict[str, Form]:
    """name -> form, in name order. A file of this folder that does not import is an error."""
    return {n: kind() for n, kind in discover.classes(sys.modules[__name__], Form).items()}


@dataclass(frozen=True)
class Spelled:
    """A format as somebody asked for it: `int4/64` is the word int4 with a group of 64."""

    word: str
    form: str
    params: Params

    def __str__(self) -> str:
        group = self.params.get("group")
        return self.word if group is None else f"{self.word}/{group or 'channel'}"


@lru_cache(maxsize=1)
def formats() -> dict[str, str]:
    """Every word of `--format` -> the name of its form."""
    found: dict[str, str] = {}
    for name, form in forms().items():
        found |= dict.fromkeys(form.formats, name)
    return dict(sorted(found.items()))


def asked(text: str, group: int | None = None) -> Spelled:
    """`int4`, `int4/64` or `int4/channel` -> form and params; `group` stands where the text has
    none. UsageError for an unknown word, or a group that the format has not.
    """
    word, slash, size = text.partition("/")
    if word not in formats():
        raise UsageError(f"no format {word!r}", hint=did_you_mean(word, formats()))
    name = formats()[word]
    found = named(name).formats[word]
    wanted: int | str | None = size if slash else group
    if wanted is None:
        return Spelled(word, name, dict(found.params))
    number = 0 if wanted == "channel" else wanted
    if not str(number).isdigit() or int(number) not in found.groups:
        sizes = ", ".join(str(g or "channel") for g in found.groups)
        raise UsageError(
            f"{word} has no group of {wanted}",
            expected=sizes or "no group: it has one size",
            found=wanted,
            hint=f"for example {word}/{sizes.partition(',')[0]}" if sizes else f"use {word}",
        )
    return Spelled(word, name, {**found.params, "group": int(number)})


def settled(asked: Spelled, target: Target) -> Spelled:
    """What a format means for one matrix: of the forms that have its word the one that holds such
    a matrix, with what the matrix's dtype decides.
    """
    able = [n for n, form in forms().items() if asked.word in form.formats]
    for name in sorted(able, key=lambda n: n != asked.form):
        form = named(name)
        params = asked.params if name == asked.form else dict(form.formats[asked.word].params)
        params = form.settled(target, params)
        if form.fits(target, params):
            return replace(asked, form=name, params=params)
    return replace(asked, params=named(asked.form).settled(target, asked.params))


def named(name: str) -> Form:
    """The form of this name; MoetoolError with the nearest names."""
    if name not in forms():
        raise MoetoolError(
            f"no form {name!r}", expected=", ".join(forms()), hint=did_you_mean(name, forms())
        )
    return forms()[name]


def seen(tensors: Mapping[str, Stored], config: Config, read: Read | None = None) -> Known:
    """Ask every form what it knows here. Where none knows anything, all is as it stands. `read`
    gives the bytes of a small tensor; without it (a plan) some shapes are not known.
    """
    found, told = dict(tensors), {}
    _check_groups(config)
    for name, form in forms().items():
        if (known := form.look(found, config, read)) is None:
            continue
        found = _replaced(found, known.matrices, known.kept)
        config, told[name] = known.config, known.told
    for form in {f.quant_method: f for f in forms().values() if f.quant_method}.values():
        form.complete(found, config)
    _refuse_parts(found, config)
    said = set(chain.from_iterable(told.values()))  # several forms may be told of by one key
    return Known(found, {k: v for k, v in config.items() if k not in said}, told)


def _check_groups(config: Config) -> None:
    """Refuse groups of experts in a form that there is not."""
    known = (*forms(), groups.EMPTY, *HELD)
    for group in groups.read(config) if groups.is_ours(config) else ():
        if group.form not in known:
            raise MoetoolError(
                f"the config names a group of experts of form {group.form!r}",
                file="config.json",
                expected="a form that this moetool knows",
                hint=did_you_mean(group.form, known),
            )


def _refuse_parts(tensors: Mapping[str, Stored], config: Config) -> None:
    """Refuse what is a part of a packed matrix by its name, and of none that a form made: by the
    config of another model, or by none, all such matrices would be overlooked.
    """
    for name, tensor in tensors.items():
        pair = name.endswith(_PAIR) and f"{name.rpartition('_')[0]}{_PAIR[1]}" in tensors
        if not tensor.parts and (name.endswith(_PARTS) or (pair and tensor.dtype == "U8")):
            said = config.get("quantization_config")
            raise MoetoolError(
                "the config does not say what this part of a packed matrix belongs to",
                tensor=name,
                expected="the quantization_config that the matrices were packed by",
                found=json.dumps(said)[:200] if said else "config.json without any",
                hint="restore the config.json that came with the model",
            )


def count(tensors: Iterable[Stored]) -> int:
    """Learned numbers of all these tensors."""
    found: dict[str, int] = {}
    for tensor in tensors:
        found |= weights(tensor)
    return sum(found.values())


def weights(tensor: Stored) -> dict[str, int]:
    """Learned numbers of a tensor by what holds them in the file (what several share counts once)."""
    parts = tensor.parts
    return named(parts.form).weights(tensor) if parts else {tensor.name: tensor.elements}


def lies_plain(stored: Stored) -> bool:
    """Whether a file holds the values of a tensor as they are, wherever in it."""
    return stored.parts is None or named(stored.parts.form).moves


def split(stored: Stored, piece: Piece) -> tuple[tuple[Piece, ...], Params | None]:
    """The parts that a piece of a matrix is decoded from, and how (an entry for `decoded`); the
    piece itself and None where it lies in the file as it is.
    """
    parts = stored.parts
    if parts is None:
        return (piece,), None
    form = named(parts.form)
    entry: Params = {"form": parts.form, "parts": len(parts.tensors), "params": parts.params}
    own = form.pieces(parts.tensors, stored.shape, piece, parts.params)
    if own is not None:
        return own, entry | {"parts": len(own), "shape": list(piece.shape)}
    every = tuple(whole(p, piece.source) for p in parts.tensors)
    partial = {"offset": piece.offset, "of": list(stored.shape)}
    return every, entry | {"shape": list(piece.shape)} | partial


def _replaced(
    tensors: dict[str, Stored], matrices: Mapping[str, Stored], kept: frozenset[str]
) -> dict[str, Stored]:
    """Matrices in the place of the first of their parts that no other matrix has, and that is not
    kept.
    """
    whose: dict[str, str] = {}
    for full, matrix in matrices.items():
        assert matrix.parts is not None
        whose |= {part.name: full for part in matrix.parts.tensors if part.name not in kept}
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        full = whose.get(name, name)
        made[full] = matrices.get(full, tensor)
    return made


def decoded(inputs: Sequence[Tensor], how: Sequence[Params | None] | None) -> list[Tensor]:
    """An operation's inputs as matrices. `how` says for each whether it is one tensor (None) or
    some parts: {form, parts, params, shape} and, where only a piece is wanted, its offset in a
    matrix of shape `of`.
    """
    if how is None:
        return list(inputs)
    rest, made = iter(inputs), []
    for entry in how:
        if entry is None:
            made.append(next(rest))
            continue
        parts = list(islice(rest, entry["parts"]))
        if parts[0].is_meta:  # a rehearsal: forms say their shapes themselves
            made.append(parts[0].new_empty(entry["shape"], dtype=_float32()))
            continue
        matrix = named(entry["form"]).decode(parts, entry.get("params", {}))
        if "offset" in entry:
            count = prod(entry["shape"])
            matrix = matrix.reshape(-1)[entry["offset"] : entry["offset"] + count]
        made.append(matrix.reshape(entry["shape"]))
    return made


def encoded(
    made: Iterator[Any], how: Sequence[Params | None] | None, shapes: Sequence[Shape]
) -> Iterator[Any]:
    """An operation's results as what lies in the file: each as it is (None), or in its parts, by an
    entry {form, parts, params, shape} and, where its rounding is not the form's own, `rounding`.
    `beside`: how many results after it are no outputs, and only seen. `shapes` of what comes out
    are what a rehearsal gives.
    """
    if how is None:
        yield from made
        return
    lying = iter(shapes)
    last: tuple[Any, Params | None] = (None, None)
    parts: Sequence[Tensor] = ()
    for entry in how:
        matrix = next(made)
        if entry is None:
            next(lying)
            yield matrix
            continue
        beside = list(islice(made, entry.get("beside", 0)))
        wanted = list(islice(lying, entry["parts"]))
        if matrix.is_meta:  # to shift bits without memory, torch imports sympy and its compiler
            yield from (matrix.new_empty(shape) for shape in wanted)
            continue
        if beside or last[0] is not matrix or last[1] != entry:  # the same again is not rounded
            parts, last = _parts(matrix, beside, entry), (matrix, entry)
        yield from parts


def _parts(matrix: Tensor, beside: Sequence[Tensor], entry: Params) -> Sequence[Tensor]:
    """The parts of a matrix: as its form rounds, or where it has a grid as `rounding` says
    ({"search": "mse"}: under the scale of least squared error).
    """
    form, params = named(entry["form"]), entry.get("params", {})
    _refuse_infinite(matrix)
    grid = form.grid(tuple(matrix.shape), params)
    if "rounding" not in entry or grid is None:
        return form.encode_beside(matrix, beside, params)
    from moetool.kernels import rounding

    return form.pack(rounding.searched(matrix, grid), params)


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _refuse_infinite(matrix: Tensor) -> None:
    """A NaN would spoil all that shares its scale, and most forms cannot hold it."""
    if matrix.is_meta or not matrix.numel():
        return
    ends = matrix.aminmax()
    if not (ends.min.isfinite() and ends.max.isfinite()):
        raise MoetoolError(
            "a matrix that is to be quantized holds NaN or inf",
            expected="finite weights",
            hint="repair the source: `--strict` names every such tensor",
        )
