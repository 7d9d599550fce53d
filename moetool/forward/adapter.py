"""The one door to transformers' loading internals: a model without memory, its decoder layers
filled and emptied one at a time.

`get_model_conversion_mapping`, `rename_source_key` and `convert_and_load_state_dict_in_model` are
what from_pretrained itself calls (transformers.core_model_loading, 5.10 to 5.23), so names,
transpositions and merged tensors are read just as stock loading reads them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.forward import stock
from moetool.surgery import groups, ragged
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.layout import Layout
from moetool.surgery.spec import rows
from moetool.surgery.text_model import text_model


class Shell:
    """A causal language model whose parameters have no memory until they are filled from the
    checkpoint, in float32.

    With `only` (n, mixture) it is the model with the first n experts of each layer: small enough
    to hold a family's own block beside ours.
    """

    def __init__(
        self, source: Checkpoint, device: str = "cpu", only: tuple[int, Mixture] | None = None
    ) -> None:
        self.source, self.device, self._only = source, device, only
        given = source.config if only is None else only[1].config_with(only[1].fields(only[0]))
        self.config = groups.stock_of(given)
        self.model = _build(source, self.config)
        self.stack, self.base = self._find_stack()
        self._places = self._map_names()

    @property
    def layers(self) -> Any:
        """The decoder layers (a ModuleList)."""
        return self.model.get_submodule(self.stack)

    def _find_stack(self) -> tuple[str, Any]:
        """The module list of decoder layers, and the module that runs them."""
        from torch import nn

        at = text_model(self.source.config)
        if at.groups or at.calibration:
            what = "groups of experts" if at.groups else "routers whose weights are corrected"
            raise MoetoolError(
                f"text cannot be sent layer by layer through {what} yet",
                file=self.source.folder,
                expected="a model of a stock class",
                hint="`moetool materialize` writes one; `import moetool` runs this one whole",
            )
        count, modules = at.field("layers"), dict(self.model.named_modules())
        name = Layout.load(str(self.config.get("model_type"))).stack or ""
        found = modules.get(name)
        if not isinstance(found, nn.ModuleList) or len(found) != count:
            raise MoetoolError(
                f"{at.layout.model_type} has no plain stack of decoder layers",
                file=self.source.folder,
                expected=f"{count} layers in a row",
                hint="text cannot be sent through this family yet; methods without text work",
            )
        return name, modules[name.rpartition(".")[0]]

    def _map_names(self) -> dict[int | None, list[str]]:
        """Layer number (None: outside the stack) -> names on disk."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self._mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        state = self.model.state_dict()
        places: dict[int | None, list[str]] = {None: []}
        self.disk: dict[str, str] = {}  # parameter -> its name on disk, where one is the other
        self._missing = set(state) - {t for t in state if _tied(self.model, t)}
        head = self.stack + "."
        for name in self.source.tensors:
            if self._left_out(name):
                continue
            there, pattern = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, state
            )
            if there not in state and name in state:
                there, pattern = name, None
            if there not in state:
                continue  # MTP layers and dead buffers: no module reads them
            if pattern is None:
                self.disk[there] = name
            self._missing -= set(self._targets(there, pattern, converters))
            number = there[len(head) :].partition(".")[0] if there.startswith(head) else ""
            places.setdefault(int(number) if number.isdigit() else None, []).append(name)
        return places

    def _left_out(self, name: str) -> bool:
        """Whether a tensor belongs to an expert that is left out."""
        if (
            self._only is None
            or (counted := self._only[1].counted.get(name)) is None
            or counted.expert is None
        ):
            return False
        count, mixture = self._only
        return count <= counted.expert < mixture.experts

    @staticmethod
    def _targets(first: str, pattern: str | None, converters: Sequence[Any]) -> list[str]:
        """Every parameter that a converter makes (one disk tensor can become several)."""
        if pattern is None:
            return [first]
        converter = next(c for c in converters if pattern in c.source_patterns)
        return [first.replace(converter.target_patterns[0], t) for t in converter.target_patterns]

    def check_complete(self, own: Sequence[str]) -> None:
        """Refuse a checkpoint that leaves a parameter unfilled (it would be random); `own` are
        prefixes that moetool reads itself.
        """
        lost = sorted(n for n in self._missing if not n.startswith(tuple(own)))
        if lost:
            raise MoetoolError(
                "a tensor that the model needs is missing",
                file=self.source.folder,
                tensor=lost[0],
                expected=f"all of {len(self._places)} groups of tensors",
                found=f"{len(lost)} parameters without a tensor",
                hint="the checkpoint is incomplete: download or make it again",
            )

    def names(self, layer: int | None) -> list[str]:
        """Names on disk of a layer (None: embeddings, last norm, head)."""
        return self._places.get(layer, [])

    def fill(self, layer: int | None, *, skip: Sequence[str] = ()) -> None:
        """Read a layer's tensors into the model. `skip`: names left on disk (the experts, which
        moetool reads itself).
        """
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        leave = set(skip)
        tensors = {self._renamed(n): self._read(n) for n in self.names(layer) if n not in leave}
        settings = LoadStateDictConfig(
            device_map={"": self.device}, dtype=torch.float32, weight_mapping=self._mapping
        )
        with _patient():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            wrong = next(
                iter([*info.mismatched_keys, *info.conversion_errors.items(), *info.error_msgs])
            )
            raise MoetoolError(
                "a tensor does not fit its place in the model",
                file=self.source.folder,
                tensor=str(wrong[0] if isinstance(wrong, tuple | list) else wrong)[:200],
                hint="config.json and the weights do not belong together: restore them from the original model",
            )
        if layer is None:
            self.model.tie_weights()

    def _renamed(self, name: str) -> str:
        """Identity experts (LongCat) follow the last expert that is there."""
        counted = self._only[1].counted.get(name) if self._only else None
        if (
            self._only is None
            or counted is None
            or counted.expert is None
            or counted.expert < self._only[1].experts
        ):
            return name
        return counted.named(counted.expert - self._only[1].experts + self._only[0])

    def _read(self, name: str) -> Any:
        import torch

        stored = self.source.tensor(name)
        counted = self._only[1].counted.get(name) if self._only else None
        if self._only is None or counted is None or counted.expert is not None:
            return self.source.matrix(name)
        count, mixture = self._only
        axis = len(stored.shape) - 1 if counted.flat else 0
        tensor = (
            self.source.matrix(name)
            if axis
            else self.source.matrix(rows(stored, 0, count * counted.rows))
        )
        extra = stored.shape[axis] - mixture.experts * counted.rows
        if axis:
            return torch.cat([tensor[..., :count], tensor[..., mixture.experts :]], -1)
        return (
            torch.cat(
                [
                    tensor,
                    self.source.matrix(rows(stored, stored.shape[0] - extra, stored.shape[0])),
                ]
            )
            if extra
            else tensor
        )

    def empty(self, layer: int) -> None:
        """Give a layer's memory back."""
        import torch

        for module in self.layers[layer].modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=False
                    )
        _trim()


def _trim() -> None:
    """Let the allocator return what it kept: glibc would hold a few MB more with every layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _build(source: Checkpoint, given: JsonObject) -> Any:
    """The class of the checkpoint, with parameters on the meta device and real buffers (rotary
    tables are computed, not stored). Layers with other numbers of experts are built alike: the walk
    gives every block its own weights.
    """
    raw = ragged.without(given, text_model(given).path)
    if raw.get("quantization_config"):
        raise MoetoolError(
            "the checkpoint is quantized",
            file=f"{source.folder}/config.json",
            found="quantization_config",
            expected="float weights",
            hint="text goes through float weights for now: dequantize it first",
        )
    model = stock.empty_model(raw, source.folder)
    return model.eval().requires_grad_(False)


def _tied(model: Any, name: str) -> bool:
    return name in (getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def _patient() -> Iterator[None]:
    """transformers starts threads and draws bars while loading; a layer at a time needs neither."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
