"""CARVE: which neurons an expert gets. Orders are decided once a layer and kept as tables of
neuron numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from moetool.errors import MoetoolError, UsageError

CLUSTER_RESERVE = 260_000_000  # numpy, scipy and scikit-learn imported, measured
_LEADS = ".leads"
ACTIVATION = "activation"  # kinds/carved.py
IMPORTANCE = "importance"  # kinds/important.py
BY_TEXT = (ACTIVATION, IMPORTANCE)
SHUFFLED = "shuffled"
FORMS = (
    "contiguous, random, shuffled (each copy anew; what --experts leave of the last one is discarded), "
    "kmeans:gate or kmeans:up, or on --calibrate activation (what fires together) "
    "or importance (what matters to the same tokens), where those that do most always run"
)


def order_name(layer: int) -> str:
    """The table of a layer's neurons, part after part."""
    return f"layer{layer}"


def leads_name(layer: int) -> str:
    """The table of a layer's neurons that stand for experts."""
    return f"{order_name(layer)}{_LEADS}"


def leads_of(tables: Iterable[str]) -> dict[int, str]:
    """layer -> such a table, of those that there are."""
    found = (name for name in tables if name.endswith(_LEADS))
    return {int(name.removeprefix("layer").removesuffix(_LEADS)): name for name in found}


def centres_name(layer: int) -> str:
    """The tensor of a layer's centres, where they are kept until they are written."""
    return f"layers.{layer}.centres"


def parse(spec: str, split: int) -> tuple[str, str]:
    """(kind, matrix): kind is contiguous, random, shuffled, activation, importance or kmeans;
    UsageError for anything else.
    """
    kinds = r"(contiguous|random|shuffled|activation|importance)|kmeans(?::(gate|up))?"
    found = re.fullmatch(kinds, spec)
    if not found:
        raise UsageError(
            f"--carve {spec!r} is not understood",
            expected=FORMS,
            hint="for example --split 8 --carve kmeans:gate",
        )
    kind = found[1] or "kmeans"
    if kind != "contiguous" and split == 1:
        raise UsageError(
            f"--carve {spec} has nothing to carve",
            expected="--split 2 or more",
            hint="leave --carve out, or add --split",
        )
    return kind, found[2] or "gate"


def order(
    kind: str, width: int, split: int, seed: int, name: str, read: Callable[[], Any]
) -> list[int] | None:
    """Neuron numbers, part after part ([width] integers), or None for the order on disk. `read`
    gives [width, hidden] rows.
    """
    if kind == "contiguous":
        return None
    if kind == "random":
        from moetool.kernels import draw

        return [int(i) for i in draw.permutation(width, seed, f"{name}/carve")]
    from moetool.kernels import cluster

    labels = cluster.balanced_kmeans(read(), split, seed)
    return [int(i) for i in labels.argsort(kind="stable")]


def shuffled(width: int, copies: int, seed: int, name: str) -> list[int]:
    """Neuron numbers of so many copies of an FFN, each in an order of its own (Qwen2, arXiv
    2407.10671), one after another: [copies x width] integers.
    """
    from moetool.kernels import draw

    orders = (draw.permutation(width, seed, f"{name}/carve/{copy}") for copy in range(copies))
    return [int(number) for number in chain.from_iterable(orders)]


def check_width(width: int, split: int) -> None:
    """Refuse a --split that does not cut an FFN of this width; UsageError."""
    if width % split:
        raise UsageError(
            "the FFN cannot be cut into equal parts",
            expected=f"a divisor of its width {width}",
            found=f"--split {split}",
            hint=f"try --split {_near_divisor(width, split)}",
        )
    if width // split % 8:
        raise UsageError(
            "expert width must be a multiple of 8",
            expected=f"{width} / split divisible by 8",
            found=f"{width // split} at --split {split}",
            hint=f"transformers' grouped kernels need it; try --split {_near_divisor(width // 8, split)}",
        )


def _near_divisor(width: int, near: int) -> int:
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - near), d))


def check_memory(width: int, hidden: int, memory: int | None) -> int:
    """Peak bytes of clustering one matrix: scikit-learn itself, the rows in float64 and twice in
    float32 (measured); refused when --memory is less.
    """
    needed = CLUSTER_RESERVE + 20 * width * hidden
    if memory is not None and needed > memory:
        raise MoetoolError(
            "clustering does not fit into --memory",
            expected=f"at least {needed:,} bytes",
            found=f"{memory:,} bytes",
            hint="raise --memory, or use --carve random",
        )
    return needed
