"""The modules of a site whose linears have no role in a layout: found by the words for their names
in archs/sites.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any, NamedTuple

from moetool.errors import MoetoolError
from moetool.surgery.family import Slot
from moetool.surgery.ffn import NORM, FfnBlock, FfnLinear, bias_slot
from moetool.surgery.layout import DATA, Layout

_WEIGHT = ".weight"
_Word = str | Sequence[str]  # a pattern of names, and where the class has another, its path


class Placed(NamedTuple):
    """A linear of a layer, and its path inside the layer in the class."""

    linear: FfnLinear
    path: str


@lru_cache(maxsize=1)
def _words() -> Mapping[str, Any]:
    """site -> the ways in which families call its linears: role -> pattern of what stands in a name
    between the layer's number and `weight`. Families whose attention can have the heads of several
    beside each other (`mixes`); those whose norms inside attention see heads before tokens
    (`turned`).
    """
    found: Mapping[str, Any] = json.loads((DATA / "sites.json").read_text())
    return found


def among(layout: Layout, word: str) -> bool:
    """Whether a family is one of those under a word."""
    return layout.family in _words()[word]


def linears(layout: Layout, site: str, mixture: bool = False) -> tuple[Placed, ...]:
    """Those of a layer, in the order of their roles. MoetoolError where the family has none, no
    plain stack of layers that are alike, or, without `mixture`, experts already.
    """
    found = _found(layout, site)
    if (layout.kind == "moe" and not mixture) or not layout.stack or not found:
        has = "it has experts already" if layout.kind == "moe" else f"stack {layout.stack}"
        raise homeless(layout, site, "a plain stack of dense layers with one", has)
    return found


def _found(layout: Layout, site: str) -> tuple[Placed, ...]:
    """Those of a layer, where there are all roles of one way to call them."""
    for style in _words()[site]:
        each = [tuple(_named(layout, role, word)) for role, word in style.items()]
        if all(each):
            return tuple(chain.from_iterable(each))
    return ()


def heads_norms(layout: Layout) -> tuple[FfnLinear, ...]:
    """The norms inside the attention of a layer, of queries and keys, where all layers have them."""
    found = (one.linear for one in _found(layout, "heads_norms"))
    return tuple(one for one in found if one.slot.layers == "all" and one.slot.when is None)


def final_norm(layout: Layout) -> tuple[FfnLinear, str]:
    """The norm behind the last layer, and its name beside the layers. MoetoolError where there is
    none.
    """
    parent = layout.stem.removesuffix(".").rpartition(".")[0]
    (style,) = _words()["final_norm"]
    slots = {slot.name: slot for slot in layout.tensors}
    for slot in layout.tensors if layout.kind == "dense" and layout.stack else ():
        beside = slot.name.removeprefix(f"{parent}.").removesuffix(_WEIGHT)
        whole = slot.name == f"{parent}.{beside}{_WEIGHT}"
        if whole and re.fullmatch(style[NORM], beside):
            bias = slots.get(f"{parent}.{beside}.bias")
            return FfnLinear(NORM, slot, bias, transposed=False, whole=True), beside
    raise homeless(layout, "final_norm", "a norm behind a plain stack of dense layers", "none")


def block(layout: Layout, site: str, mixture: bool = False) -> FfnBlock:
    """The module of a layer that holds them all, with paths inside it. MoetoolError where none
    does.
    """
    found = linears(layout, site, mixture)
    inside = _head([one.path for one in found])
    module = _head([one.linear.slot.name.removesuffix(_WEIGHT) for one in found])
    if not inside or module.endswith("{layer}"):
        raise homeless(layout, site, "a module that holds it", ", ".join(o.path for o in found))
    within = {one.linear.role: one.path.removeprefix(f"{inside}.") for one in found}
    own = tuple(one.linear.at(within[one.linear.role]) for one in found)
    return FfnBlock(module, own, inside, mixes=among(layout, "mixes") and len(own) > 2)


def _named(layout: Layout, role: str, word: _Word) -> Iterator[Placed]:
    """The linears of a role."""
    pattern, path = (word, "") if isinstance(word, str) else word
    turned = layout.overlay.linears == "transposed" and role != NORM
    for slot in layout.tensors:
        inside = slot.name.partition("{layer}.")[2]
        lies = inside.removesuffix(_WEIGHT)
        if lies == inside or not re.fullmatch(pattern, lies):
            continue
        if "{" in lies:  # a number more, which the path has
            name = f"{slot.name.removesuffix(inside)}{path}{_WEIGHT}"
            slot = Slot(name, slot.shape or [None, None], slot.role, "some")
        bias = bias_slot(layout.tensors, slot.name.removesuffix(_WEIGHT) + ".bias")
        linear = FfnLinear(role, slot, bias, turned, role == NORM)
        yield Placed(linear, path or lies)


def _head(paths: Sequence[str]) -> str:
    """What dotted paths have in common, of those parts that hold something."""
    heads = [path.split(".")[:-1] for path in paths]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*heads, strict=False))
    return ".".join(parts[0] for parts in same)


def homeless(layout: Layout, site: str, expected: str, found: str) -> MoetoolError:
    """What to say of a family that has no such site."""
    return MoetoolError(
        f"{layout.model_type} has no place for groups of experts at the site {site}",
        expected=expected,
        found=found,
        hint=f"choose another --site; `moetool archs show {layout.family}` shows what is known of it",
    )
