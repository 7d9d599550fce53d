"""What each decoder layer is called with beside its input: asked of the model once for each batch
shape, with recorders in the layers' place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.forward.batches import Batch

Tensor = torch.Tensor
Args = tuple[Any, ...]
Kwargs = JsonObject
Act = Callable[[Tensor, Args, Kwargs], Tensor]


class HasLayers(Protocol):
    """A model with a stack of decoder layers (forward/adapter.py, forward/whole.py)."""

    model: Any
    base: Any

    @property
    def layers(self) -> Any:
        """The decoder layers (a ModuleList)."""


class Calls:
    """What each decoder layer is called with. Asked once for each batch shape, with recorders in
    the layers' place.
    """

    def __init__(self, shell: HasLayers, device: str) -> None:
        self.shell, self.device = shell, device
        self._known: dict[tuple[int, ...], list[tuple[Args, Kwargs]]] = {}

    def enter(self, batch: Batch) -> Tensor:
        """Embed a batch; returns the first layer's input [sequences, length, hidden]."""
        seen: list[tuple[Tensor, Args, Kwargs]] = []

        def record(x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
            seen.append((x, args, kwargs))
            return x

        with self._stand_ins(record):
            self.shell.base(input_ids=torch.from_numpy(batch.ids).to(self.device), use_cache=False)
        calls = [(a, k) for _, a, k in seen]
        known = self._known.setdefault(batch.ids.shape, calls)
        if not same(known, calls):
            raise UsageError(
                "this family passes its layers something that depends on the text itself",
                found=type(self.shell.base).__name__,
                hint="text cannot be sent through it layer by layer yet; methods without text work",
            )
        return seen[0][0]

    def of(self, batch: Batch, layer: int) -> tuple[Args, Kwargs]:
        """(args, kwargs) of a layer for batches of this shape, beside the hidden states."""
        if batch.ids.shape not in self._known:
            self.enter(batch)
        return self._known[batch.ids.shape][layer]

    def leave(self, batch: Batch, x: Tensor, places: Tensor) -> Tensor:
        """Last norm, head, and whatever the class does to logits."""
        with self._stand_ins(lambda h, a, k: x):
            out = self.shell.model(
                input_ids=torch.from_numpy(batch.ids).to(self.device),
                use_cache=False,
                logits_to_keep=places.to(self.device),
            )
        made: Tensor = out.logits
        return made

    def _stand_ins(self, act: Act) -> StandIns:
        return StandIns(self.shell.layers, act)


class StandIns:
    """For a while, modules that only note how they are called sit where the decoder layers were."""

    def __init__(self, layers: nn.ModuleList, act: Act) -> None:
        self.layers, self.act = layers, act

    def __enter__(self) -> None:
        self._real = list(self.layers)
        for i, layer in enumerate(self._real):
            self.layers[i] = StandIn(layer, self.act)

    def __exit__(self, *_: object) -> None:
        for i, layer in enumerate(self._real):
            self.layers[i] = layer


class StandIn(nn.Module):
    def __init__(self, layer: nn.Module, act: Act) -> None:
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_act"] = layer, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_act"](hidden_states, args, kwargs)


def same(a: Any, b: Any) -> bool:
    """Whether two calls are alike, tensors by value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b)
