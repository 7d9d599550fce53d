"""Methods: what moetool can do to a checkpoint. One file a method; the name is looked up here and
imported on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from moetool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from moetool.methods.contract import Method


@dataclass(frozen=True)
class Entry:
    """A verb in the registry: where its class lies, and what it is for in one line."""

    place: str
    about: str


METHODS = {
    "upcycle": Entry(
        "moetool.methods.upcycle.method:Upcycle",
        "Turn a dense checkpoint, or several fine-tunes of one, into a mixture of experts.",
    ),
    "prune": Entry(
        "moetool.methods.prune.method:Prune",
        "Remove experts from a mixture of experts; the others stay, or are refitted.",
    ),
    "merge": Entry(
        "moetool.methods.merge.method:Merge",
        "Merge experts of a mixture of experts into fewer: the checkpoint really gets smaller.",
    ),
    "extend": Entry(
        "moetool.methods.extend.method:Extend",
        "Add copies of experts to a mixture of experts, as room for something new.",
    ),
    "add-tokens": Entry(
        "moetool.methods.tokens.method:AddTokens",
        "Add rows for new tokens to embeddings and head; what is there stays.",
    ),
    "quantize": Entry(
        "moetool.methods.quantize.method:Quantize",
        "Store a model in fewer bits: every expert quantized, or named as left out.",
    ),
    "dequantize": Entry(
        "moetool.methods.convert.dequantize:Dequantize",
        "Write every matrix of a quantized checkpoint in full again.",
    ),
    "materialize": Entry(
        "moetool.methods.upcycle.materialize:Materialize",
        "Write a model with groups of experts as one of a class that every client loads.",
    ),
    "convert-layout": Entry(
        "moetool.methods.convert.layout:ConvertLayout",
        "Write the same experts as single tensors, or stacked; only bytes move.",
    ),
}


def load(name: str) -> type[Method]:
    """The method class of a name; UsageError with the nearest names when there is none."""
    if name not in METHODS:
        raise UsageError(f"no method {name!r}", hint=did_you_mean(name, METHODS))
    module, _, attribute = METHODS[name].place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return cast("type[Method]", found)


def make(name: str, values: Mapping[str, object]) -> Method:
    """A method with these options; an option it has not, or a value that does not fit, is a
    UsageError.
    """
    return load(name).make(values)
