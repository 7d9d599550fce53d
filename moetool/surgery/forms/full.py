"""Every value as it is, in the tensor that the family names. What no other form knows is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.surgery.forms.form import Config, Form, Params, Recognised, Written
from moetool.surgery.spec import Stored, Target

if TYPE_CHECKING:
    from torch import Tensor


class Full(Form):
    """One tensor, the matrix itself."""

    name: ClassVar[str] = "full"

    def fits(self, target: Target, params: Params) -> bool:
        return True

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        return (target,)

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        return None

    def config(self, config: Config, told: Config, written: Written) -> Config:
        return config

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        return parts[0]

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        return (matrix,)
