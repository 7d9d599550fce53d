"""An adapter as PEFT reads it: one file of safetensors, and `adapter_config.json` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from moetool.data import JsonObject
from moetool.surgery import companions
from moetool.surgery.containers.container import Shard, Whole
from moetool.surgery.containers.safetensors import Safetensors
from moetool.surgery.spec import Target

CONFIG, WEIGHTS = companions.ADAPTER, "adapter_model.safetensors"


class PeftFolder(Safetensors):
    """No model by itself: config, tokenizer and all other weights are the base's."""

    name: ClassVar[str] = "peft"
    config: ClassVar[str] = CONFIG
    is_model: ClassVar[bool] = False

    def lay(self, number: int, count: int, tensors: Sequence[Target], tasks: list[int]) -> Shard:
        return replace(super().lay(number, count, tensors, tasks), name=WEIGHTS)

    def beside(self, whole: Whole) -> dict[str, JsonObject]:
        """Nothing: there is one file."""
        return {}
