"""Numbers that are none: said as soon as they are seen, by the layer they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.errors import MoetoolError

if TYPE_CHECKING:
    from torch import Tensor


def check(folder: str, layer: int, **tensors: Tensor) -> None:
    """MoetoolError when one of the tensors (`input=`, `output=` of a block) holds NaN or inf."""
    for what, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise MoetoolError(
                f"the model's numbers are NaN or infinite: the {what} of layer {layer}'s experts",
                file=folder,
                tensor=f"layer {layer}",
                expected="finite numbers",
                hint="a weight in this layer or below it is NaN or inf, or too large: --strict "
                "names the tensor",
            )
