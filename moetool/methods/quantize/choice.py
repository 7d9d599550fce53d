"""What was chosen: a format for each matrix, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moetool.surgery.forms import Spelled
from moetool.surgery.roles import Matrix
from moetool.surgery.spec import InParts


@dataclass(frozen=True)
class Choice:
    """Every matrix with its format, and those that stay as they are, by name with the reason."""

    formats: Mapping[str, Spelled]  # by the name in the output
    matrices: Mapping[str, Matrix]
    left: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    kept: Mapping[str, InParts] = field(default_factory=dict)  # what stays quantized, as it lies
