"""What an operation is given (surgery/ops.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.data import JsonMapping
from moetool.surgery.spec import Shape

if TYPE_CHECKING:
    from torch import Tensor

Tables = Mapping[str, list[int]]


@dataclass(frozen=True)
class Call:
    """What an operation is given: inputs (decoded), the shapes of its results, the parameters of
    its task, and the tables that they name.
    """

    inputs: Sequence[Tensor]
    shapes: Sequence[Shape]
    params: JsonMapping
    tables: Tables
