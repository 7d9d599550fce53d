"""Operations on what fine-tunes changed in a matrix: it becomes the parts of an expert over that
matrix; and on what routers are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moetool.surgery.call import Call

if TYPE_CHECKING:
    from torch import Tensor


def low_rank(call: Call) -> Iterator[Tensor]:
    """lora_A and lora_B of what a fine-tune changed in a matrix."""
    from moetool.kernels import change

    base, tuned = (m.T if call.params["transposed"] else m for m in call.inputs)
    a, b = change.factors(tuned.double() - base.double(), call.params["rank"])
    yield from (a, b / call.params["scale"])


def _changed(call: Call) -> Tensor:
    """What a fine-tune changed in a matrix [out, in], float32."""
    base, tuned = (m.T if call.params["transposed"] else m for m in call.inputs)
    return tuned.float() - base.float()


def added(call: Call) -> Iterator[Tensor]:
    """A matrix with a low-rank change, computed in float32."""
    base, a, b = (m.float() for m in call.inputs)
    change = (b @ a).T if call.params["transposed"] else b @ a
    yield base + change * call.params["scale"]


def sparse(call: Call) -> Iterator[Tensor]:
    """delta_rows, delta_columns and delta_values: the largest numbers, or with a seed some."""
    from moetool.kernels import delta

    params, change, (count,) = call.params, _changed(call), call.shapes[-1]
    if "seed" in params:
        yield from delta.drawn(change, count, params["seed"], params["name"])
    else:
        yield from delta.largest(change, count)


def places(call: Call) -> Iterator[Tensor]:
    """delta_rows and delta_columns of places at random."""
    from moetool.kernels import delta

    params, ((rows,), (count,)) = call.params, call.shapes
    yield from delta.somewhere((rows - 1, params["width"]), count, params["seed"], params["name"])


def coded(call: Call) -> Iterator[Tensor]:
    """delta_packed and delta_scale."""
    from moetool.kernels import delta, packing
    from moetool.surgery.forms.kbit import levels

    params, change = call.params, _changed(call)
    made = delta.coded(change, levels(params["bits"], params["group"], params["scale"]))
    if change.is_meta:  # to shift bits without memory, torch imports its compiler
        yield from (change.new_empty(shape) for shape in call.shapes)
    else:
        yield from (packing.words(made.codes, params["bits"]), made.scales)


def domain_rows(call: Call) -> Iterator[Tensor]:
    """The rows of a router [choices, hidden] that a SwiGLU MLP makes of embeddings, times `scale`:
    of domains [choices, dim], gate and up [width, dim] and down [hidden, width].
    """
    from torch.nn import functional

    domains, gate, up, down = (m.float() for m in call.inputs)
    middle = functional.silu(domains @ gate.T) * (domains @ up.T)
    yield middle @ down.T * call.params["scale"]
