"""Numbers that are none: said as soon as they are seen, by the layer they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.errors import MoetoolError

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.moe import Experts


def check(folder: str, layer: int, **tensors: Tensor) -> None:
    """MoetoolError when one of the tensors (`input=`, `output=` of a block) holds NaN or inf."""
    for what, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise broken(folder, layer, what)


def broken(folder: str, layer: int, what: str) -> MoetoolError:
    """What is said where numbers of a layer's experts are none."""
    return MoetoolError(
        f"the model's numbers are NaN or infinite: the {what} of layer {layer}'s experts",
        file=folder,
        tensor=f"layer {layer}",
        expected="finite numbers",
        hint="a weight in this layer or below it is NaN or inf, or too large: --strict names the "
        "tensor",
    )


def check_experts(folder: str, layer: int, experts: Experts) -> None:
    """The same for the weights of a layer's experts, one expert at a time: what compares weights
    would go wrong on them without saying why.
    """
    for tensor in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias):
        for own in () if tensor is None else tensor:
            check(folder, layer, weights=own)
