"""Text through a model that is held whole: one with groups of experts, whose routes may look at
more than a layer's input (the kinds of tokens, the prompt), and which runs in its derived class.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from moetool.errors import MoetoolError
from moetool.forward import load, stock
from moetool.forward.batches import Batches
from moetool.forward.calls import Calls
from moetool.forward.needs import whole
from moetool.forward.through import TextThrough
from moetool.forward.walk import Budget
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.text_model import text_model

Tensor = torch.Tensor


class WholeShell:
    """A loaded model, as `Calls` asks for it: its stack of layers and the module that runs them."""

    def __init__(self, source: Checkpoint, device: str) -> None:
        self.source = source
        made, info = stock.load(source)
        load.refuse_other(source.folder, {k: set(v) for k, v in info.items()}, set())
        self.model: Any = made.eval().requires_grad_(False).to(device)
        self.stack = text_model(source.config).layout.stack or ""
        modules = dict(self.model.named_modules())
        if not isinstance(modules.get(self.stack), nn.ModuleList):
            raise MoetoolError(
                "this family has no plain stack of decoder layers",
                file=source.folder,
                expected="layers in a row",
                hint="text cannot be sent through this family yet",
            )
        self.base: Any = modules[self.stack.rpartition(".")[0]]

    @property
    def layers(self) -> Any:
        """The decoder layers (a ModuleList)."""
        return self.model.get_submodule(self.stack)


class WholeModel(TextThrough):
    """One model and its text: `run` sends everything through, afterwards `logits` gives the head's
    answer batch by batch, as those of `Walk` do. In float32, experts as packed as they are stored.
    """

    def __init__(
        self,
        source: Checkpoint,
        batches: Batches,
        budget: Budget,
        *,
        tell: Progress = silent,
        stop: threading.Event | None = None,
        name: str = "layers",
    ) -> None:
        self.source, self.batches, self.budget = source, batches, budget
        self.tell, self.name, self.stop = tell, name, stop or threading.Event()
        self.peak = self.retained = whole(source, batches, extra=budget.extra)
        if budget.memory is not None and self.peak > budget.memory:
            raise MoetoolError(
                "a model with groups of experts runs whole, and does not fit into --memory",
                file=source.folder,
                expected=f"at least {self.peak:,} bytes",
                found=f"{budget.memory:,} bytes",
                hint="raise --memory, or lower --batch-tokens",
            )
        self.shell = WholeShell(source, budget.device)
        self.calls = Calls(self.shell, budget.device)
        self._made: list[Tensor] = []  # what the last layer gave

    @torch.no_grad()
    def run(self) -> None:
        """Send every batch through the model."""
        hook = self.shell.layers[-1].register_forward_hook(self._keep)
        done, total = 0, self.batches.total
        try:
            with stock.running(self.source.folder):
                for batch in self.batches.batches:
                    self.maybe_stop()
                    self.tell(Stage(self.name, "tokens"), done, total)
                    ids = torch.from_numpy(batch.ids).to(self.budget.device)
                    self.shell.model(input_ids=ids, use_cache=False, logits_to_keep=1)
                    done += batch.tokens
        finally:
            hook.remove()
        self.tell(Stage(self.name, "tokens"), total, total)

    def _keep(self, module: nn.Module, args: Any, made: Any) -> None:
        self._made.append(made[0] if isinstance(made, tuple) else made)

    def last(self, number: int) -> Tensor:
        return self._made[number]
