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

CONFIG, WEIGHTS = companions.ADAPTED


class PeftFolder(Safetensors):
    """No model by itself: config, tokenizer and all other weights are the base's. A tensor called
    `1/NAME` lies in the folder `1`, where another adapter is, and is called NAME there (X-LoRA).
    """

    name: ClassVar[str] = "peft"
    config: ClassVar[str] = CONFIG
    is_model: ClassVar[bool] = False

    def folder(self, tensor: str) -> str:
        return tensor.rpartition("/")[0]

    def lay(self, number: int, count: int, tensors: Sequence[Target], tasks: list[int]) -> Shard:
        name = "/".join(filter(None, (self.folder(tensors[0].name), WEIGHTS)))
        return replace(super().lay(number, count, tensors, tasks), name=name)

    def header(self, shard: Shard, whole: Whole) -> bytes:
        inner = {name: name.rpartition("/")[2] for name in shard.offsets}
        offsets = {inner[name]: where for name, where in shard.offsets.items()}
        targets = {inner[name]: whole.targets[name] for name in shard.offsets}
        return super().header(replace(shard, offsets=offsets), replace(whole, targets=targets))

    def beside(self, whole: Whole) -> dict[str, JsonObject]:
        """Nothing: there is one file in each folder."""
        return {}
