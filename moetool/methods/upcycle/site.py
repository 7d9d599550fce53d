"""SITE: which layers get experts."""

from __future__ import annotations

import re
from typing import Any

from moetool.errors import UsageError
from moetool.surgery.layout import Layout

FORMS = "all, none, every:N[+OFFSET], first-half, second-half, last:N, or a list like 0,2,5-7"


def parse(spec: str, count: int) -> tuple[int, ...]:
    """Layer numbers of a model with `count` layers; UsageError for a form or a number that does
    not exist.
    """
    every = range(count)
    if spec == "all":
        return tuple(every)
    if spec == "none":
        return ()
    if spec == "first-half":
        return tuple(every[: count // 2])
    if spec == "second-half":
        return tuple(every[count // 2 :])
    if found := re.fullmatch(r"every:([1-9]\d*)(?:\+(\d+))?", spec):
        chosen = tuple(every[int(found[2] or 0) :: int(found[1])])
    elif found := re.fullmatch(r"last:([1-9]\d*)", spec):
        chosen = tuple(every[-int(found[1]) :]) if int(found[1]) <= count else (count,)
    elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", spec):
        chosen = tuple(sorted({i for part in spec.split(",") for i in _span(part)}))
    else:
        raise UsageError(
            f"--layers {spec!r} is not understood",
            expected=FORMS,
            hint="for example --layers every:2",
        )
    if not chosen or chosen[-1] >= count:
        raise UsageError(
            f"--layers {spec} names a layer that is not there",
            expected=f"layers 0 to {count - 1}",
            hint=f"forms: {FORMS}",
        )
    return chosen


def _span(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def fields(layers: tuple[int, ...], count: int, target: Layout, width: int) -> dict[str, Any] | str:
    """The target's config fields for these MoE layers, or a sentence why the family cannot hold
    them.
    """
    sites = target.overlay.sites
    dense = [i for i in range(count) if i not in layers]
    if not sites:
        return (
            {}
            if not dense
            else f"{target.model_type} has experts in every layer (here {len(dense)} of {count} would stay dense)"
        )
    if "dense_list" in sites:
        return {sites["dense_list"]: dense, sites["step"]: 1}
    if "types" in sites:
        wide = {sites["dense_width"]: width} if dense and "dense_width" in sites else {}
        return {sites["types"]: ["sparse" if i in layers else "dense" for i in range(count)]} | wide
    if "dense_prefix" in sites:
        if dense != list(range(len(dense))):
            return f"{target.model_type} keeps dense layers only before the first MoE layer (use --layers last:N)"
        return {sites["dense_prefix"]: len(dense)}
    start, end, step = sites["range"]
    for stride in range(1, count + 1):
        if (
            layers
            and tuple(i for i in range(layers[0], layers[-1] + 1) if (i + 1) % stride == 0)
            == layers
        ):
            return {start: layers[0], end: layers[-1], step: stride}
    return f"{target.model_type} takes a first and last layer and a stride only"
