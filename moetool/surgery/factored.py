"""moetool's own form of experts: a shared base and two thin factors for each expert's difference.
W_e = base + u_e v_e.

Stock loaders would start such experts at random with only a warning, so the config names no model
type they know: they refuse it. `Factored` gives the checkpoint back to those who read it here (the
walk) as if the matrices were there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Stored

MODEL_TYPE = "moetool_base_delta"
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.[^.]+\.weight$)")


def factored_name(name: str, part: str) -> str:
    """`...experts.3.gate_proj.weight` -> `...experts.base.gate_proj.weight`, or
    `...experts.3.gate_proj.delta_u`, `delta_v`.
    """
    return (
        _NUMBER.sub("base", name)
        if part == "base"
        else f"{name.removesuffix('.weight')}.delta_{part}"
    )


class CONFIG:
    """The config of a factored checkpoint: the original's inside, under a model type that stock
    loaders do not know.
    """

    @staticmethod
    def wrap(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["MoetoolBaseDelta"],
            "moetool_form": {"experts": "base + u v", "ranks": ranks, "read_with": "moetool eval"},
            "base_config": config,
        }

    @staticmethod
    def is_factored(config: dict[str, Any]) -> bool:
        return config.get("model_type") == MODEL_TYPE and isinstance(
            config.get("base_config"), dict
        )


@dataclass(frozen=True)
class Factored(Checkpoint):
    """A factored checkpoint under its original names; `parts` say what each missing matrix is made
    of: (base, u, v).
    """

    parts: dict[str, tuple[Stored, Stored, Stored]] | None = None


def unfold(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or one in moetool's own form under the names and config of the
    original.
    """
    if not CONFIG.is_factored(checkpoint.config):
        return checkpoint
    tensors = {
        n: t
        for n, t in checkpoint.tensors.items()
        if not n.endswith((".delta_u", ".delta_v")) and ".experts.base." not in n
    }
    parts = {}
    for name, u in checkpoint.tensors.items():
        if not name.endswith(".delta_u"):
            continue
        full = name.removesuffix(".delta_u") + ".weight"
        v, base = (
            checkpoint.tensors.get(name[:-1] + "v"),
            checkpoint.tensors.get(factored_name(full, "base")),
        )
        if v is None or base is None:
            raise MoetoolError(
                "a factored matrix is incomplete",
                file=checkpoint.folder,
                tensor=full,
                expected="base, delta_u and delta_v",
                hint="make the checkpoint again",
            )
        parts[full] = (base, u, v)
        tensors[full] = replace(base, name=full)
    return Factored(
        checkpoint.folder, checkpoint.config["base_config"], tensors, checkpoint.files, parts
    )
