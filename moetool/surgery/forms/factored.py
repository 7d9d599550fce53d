"""moetool's own form of experts: a shared base and two thin factors for each expert's difference.
W_e = base + u_e v_e.

Stock loaders would start such experts at random with only a warning, so the config names no model
type they know: they refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.errors import MoetoolError
from moetool.surgery.forms.form import Config, Form, Params, Recognised, Written, made_of
from moetool.surgery.spec import InParts, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "moetool_base_delta"
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.[^.]+\.weight$)")


class Factored(Form):
    """base, u [rows, rank] and v [rank, columns]; params: {rank}. Experts of a layer share their
    base.
    """

    name: ClassVar[str] = "factored"
    alone: ClassVar[bool] = False

    def fits(self, target: Target, params: Params) -> bool:
        return len(target.shape) == 2 and _NUMBER.search(target.name) is not None

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        (rows, columns), rank = target.shape, params["rank"]
        stem = target.name.removesuffix(".weight")
        return (
            Target(_NUMBER.sub("base", target.name), target.dtype, target.shape),
            Target(f"{stem}.delta_u", target.dtype, (rows, rank)),
            Target(f"{stem}.delta_v", target.dtype, (rank, columns)),
        )

    def weights(self, matrix: Stored) -> dict[str, int]:
        assert matrix.parts is not None
        return {p.name: p.elements for p in matrix.parts.tensors}

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        inner = config.get("base_config")
        if config.get("model_type") != MODEL_TYPE or not isinstance(inner, dict):
            return None
        found = {}
        for name, u in tensors.items():
            if not name.endswith(".delta_u"):
                continue
            full = name.removesuffix(".delta_u") + ".weight"
            v, base = tensors.get(name[:-1] + "v"), tensors.get(_NUMBER.sub("base", full))
            if v is None or base is None:
                raise MoetoolError(
                    "a factored matrix is incomplete",
                    tensor=full,
                    expected="base, delta_u and delta_v",
                    hint="make the checkpoint again",
                )
            parts = InParts(self.name, (base, u, v), {"rank": u.shape[1]})
            found[full] = made_of(self.name, full, base.dtype, base.shape, parts)
        return Recognised(found, inner, {"moetool_form": config.get("moetool_form", {})})

    def config(self, config: Config, told: Config, written: Written) -> Config:
        return wrapped(config, told["moetool_form"].get("ranks", {}))

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        base, u, v = (p.float() for p in parts)
        return base + u @ v

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        raise MoetoolError(
            "a single matrix cannot be written as base and difference",
            expected="all experts of a layer",
            hint="`moetool merge --form factored` makes them together",
        )


def wrapped(config: Config, ranks: Mapping[str, int]) -> Config:
    """The config of a factored checkpoint: the original's inside, under a model type that stock
    loaders do not know.
    """
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MoetoolBaseDelta"],
        "moetool_form": {
            "experts": "base + u v",
            "ranks": dict(ranks),
            "read_with": "moetool eval",
        },
        "base_config": config,
    }
