"""The walk: every batch through one layer, then the next; one layer's weights in memory at a time.

A MoE block's input is caught and the block computed by kernels/moe.py, which shows each expert at
work; on the first batch of the first MoE layer the family's own block must agree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moetool.errors import MoetoolError, Stopped
from moetool.forward import block as blocks
from moetool.forward.adapter import Shell
from moetool.forward.batches import Batch, Batches
from moetool.forward.block import Block
from moetool.forward.calls import Calls
from moetool.forward.hidden import Hidden
from moetool.forward.needs import compared_experts, needs
from moetool.kernels import moe
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.layout import text_model

Tensor = torch.Tensor
COMPARED = 256  # tokens on which the family's own block is asked
# largest difference from the family's own block, relative to its largest output, float32
AGREE = 2e-4


class Look(Protocol):
    """Sees every MoE layer at work; `batch` gets real tokens only."""

    def begin(self, layer: int, block: Block, tokens: int) -> None: ...

    def batch(self, file: int, x: Tensor, routing: moe.Routing) -> Callable[[moe.AtWork], None]: ...

    def after(self, before: Tensor, out: Tensor) -> None: ...

    def end(self) -> None: ...


Change = Callable[[int, Block], Block | None]


@dataclass(frozen=True)
class Budget:
    """What the walk may hold, and where it may spill and resume. `memory` None: as much as it
    needs.
    """

    memory: int | None = None
    folder: Path | None = None
    device: str = "cpu"


class Walk:
    """One model and its text. `run` sends everything through; afterwards `logits` gives the head's
    answer batch by batch.
    """

    def __init__(
        self,
        source: Checkpoint,
        batches: Batches,
        budget: Budget,
        *,
        extra: int = 0,
        tell: Progress = silent,
        stop: threading.Event | None = None,
        name: str = "layers",
    ) -> None:
        self.source, self.batches, self.budget = source, batches, budget
        self.tell, self.name = tell, name
        self.stop = stop or threading.Event()
        at = text_model(source.config)
        self.mixture = Mixture.of(source) if at.layout.kind == "moe" else None
        needed = needs(source, batches, extra=extra)
        fit = needed.fit(budget.memory)
        self.widen, self.peak = fit.widen, fit.peak
        # bytes held after `run`
        self.retained = needed.outside + (0 if fit.spill else needed.hidden)
        self.width = int(at.layout.field("hidden", at.config) or 0)
        self.shell = Shell(source, budget.device)
        self._experts = self._own() if self.mixture else {}
        self.shell.check_complete(
            [f"{self.shell.stack}.{layer}.{self._block_name(layer)}." for layer in self._experts]
        )
        self.hidden = Hidden(batches.batches, self.width, folder=budget.folder, spill=fit.spill)
        self.calls = Calls(self.shell, budget.device)
        self._checked = False

    def _own(self) -> dict[int, list[str]]:
        """layer -> names of a MoE block's tensors, which are read here and not by transformers."""
        assert self.mixture is not None
        return {
            n: [
                *(c.stored.name for c in self.mixture.by_layer[n]),
                *(s.name for s in self.mixture.shared(n).values()),
            ]
            for n in self.mixture.layers
        }

    def _block_name(self, layer: int) -> str:
        """The layer's submodule that holds router and experts."""
        assert self.mixture is not None
        name = self.mixture.layout.experts.block
        if name in dict(self.shell.layers[layer].named_modules()):
            return str(name)
        raise MoetoolError(
            "a layer should hold experts, but its class has none",
            file=self.source.folder,
            tensor=f"layer {layer}",
            hint="config.json and the weights do not belong together",
        )

    @torch.no_grad()
    def run(self, look: Look | None = None, change: Change | None = None) -> None:
        """Send every batch through all layers. `change` may give a layer another block after it
        was looked at; the layers above then see its output. With a folder the walk goes on where
        an earlier one stopped.
        """
        try:
            self._run(look, change)
        except OSError as problem:
            raise MoetoolError(
                f"a walk cannot go on: {problem.strerror or problem}",
                file=problem.filename or self.budget.folder or self.source.folder,
                hint="mend the cause (free space?) and run the same command again; layers that are done are kept",
            ) from None

    def _run(self, look: Look | None, change: Change | None) -> None:
        self.shell.fill(None)
        if not self.hidden.resume():
            self._embed()
        count, begun = len(self.shell.layers), time.monotonic()
        stage = Stage(self.name, "layers")
        for layer in range(self.hidden.layer, count):
            self.tell(stage, layer, count)
            took = time.monotonic()
            self._layer(layer, look, change)
            self.hidden.end(keep=time.monotonic() - took > 0.5 or time.monotonic() - begun < 5)
        self.tell(stage, count, count)

    def _embed(self) -> None:
        """The first layer's input of every batch."""
        self.hidden.first()
        for number, batch in enumerate(self.batches.batches):
            self._maybe_stop()
            self.hidden.write(number, self.calls.enter(batch).reshape(-1, self.width).cpu().numpy())
        self.hidden.end(keep=False)

    def _layer(self, layer: int, look: Look | None, change: Change | None) -> None:
        module = self.shell.layers[layer]
        if layer not in self._experts:
            self.shell.fill(layer)
            self._pass(layer, module, None, store=True)
            self.shell.empty(layer)
            return
        assert self.mixture is not None
        own = module.get_submodule(self._block_name(layer))
        if not self._checked and self.mixture.count_in(layer) == self.mixture.experts:
            self._compare(layer)
            self._checked = True
        block = blocks.read(self.mixture, layer, device=self.budget.device, widen=self.widen)
        self.shell.fill(layer, skip=self._experts[layer])
        catch = _Catch(own, block, look, self.mixture.layout.overlay.returns_logits)
        if look is not None:
            look.begin(layer, block, self.batches.total)
        with catch:
            self._pass(layer, module, catch, store=change is None)
            if look is not None:
                look.end()
            if change is not None:
                catch.look, catch.block = None, change(layer, block) or block
                self._pass(layer, module, catch, store=True)
        self.shell.empty(layer)

    def _pass(self, layer: int, module: nn.Module, catch: _Catch | None, *, store: bool) -> None:
        """All batches through one layer; `store` keeps the output as the next layer's input."""
        self.hidden.begin()
        for number, batch in enumerate(self.batches.batches):
            self._maybe_stop()
            if catch is not None:
                catch.batch = batch
            made = self._one(layer, module, batch, number, catch)
            if store:
                self.hidden.write(number, made.reshape(-1, self.width).cpu().numpy())

    def _one(
        self, layer: int, module: nn.Module, batch: Batch, number: int, catch: _Catch | None
    ) -> Tensor:
        x = (
            torch.from_numpy(np.array(self.hidden.read(number)))
            .to(self.budget.device)
            .reshape(*batch.ids.shape, self.width)
        )
        args, kwargs = self.calls.of(batch, layer)
        made = module(x, *args, **kwargs)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        if catch is not None:
            catch.after(out)
        return out

    def _compare(self, layer: int) -> None:
        """Our block against the family's own, with the layer's first experts on the first tokens;
        a difference is a loud error.

        Few experts are enough to show law, orientation and activation, and the family's merged
        copy of them stays small.
        """
        assert self.mixture is not None
        few = compared_experts(self.mixture)
        shell = Shell(self.source, self.budget.device, (few, self.mixture))
        shell.fill(layer)
        own = shell.layers[layer].get_submodule(self._block_name(layer))
        first = self.batches.batches[0]
        tokens = min(COMPARED, int(first.lengths[0]))
        batch = Batch(first.ids[:1, :tokens], np.array([tokens]), first.file)
        caught: list[tuple[Tensor, Any]] = []
        own.register_forward_hook(
            lambda m, args, kwargs, out: caught.append(((args or tuple(kwargs.values()))[0], out)),
            with_kwargs=True,
        )
        x = torch.from_numpy(self.hidden.read(0)[:tokens].copy()).to(self.budget.device)[None]
        args, kwargs = self.calls.of(batch, layer)
        shell.layers[layer](x, *args, **kwargs)
        seen, theirs = caught[0]
        self._check_returned(layer, theirs)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        seen, theirs = (t.detach().reshape(-1, t.shape[-1]) for t in (seen, theirs))
        del shell, own
        part = blocks.read(self.mixture, layer, device=self.budget.device, only=few)
        mine, always = part.routed(seen, part.route(seen)), part.always(seen)
        mine = mine if always is None else mine + always
        apart = float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not apart <= AGREE:
            raise MoetoolError(
                f"moetool computes a MoE block of {self.mixture.layout.model_type} otherwise than transformers does",
                file=self.source.folder,
                tensor=f"layer {layer}",
                expected=f"a relative difference of at most {AGREE:g}",
                found=f"{apart:.3g}",
                hint="nothing was decided on wrong numbers; please report it. Methods without text still work",
            )

    def _check_returned(self, layer: int, returned: object) -> None:
        """What the family's own block gave must be what the layout says it gives: a layer that
        takes another thing would fail, or go on with the wrong one.
        """
        assert self.mixture is not None
        said = self.mixture.layout.overlay.returns_logits
        if isinstance(returned, tuple) != said:
            raise MoetoolError(
                f"a MoE block of {self.mixture.layout.model_type} gives another thing than expected",
                file=self.source.folder,
                tensor=f"layer {layer}",
                expected="(output, router logits)" if said else "the output alone",
                found=type(returned).__name__,
                hint="please report it; methods without text still work",
            )

    def _maybe_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped(
                "stopped while text went through the model",
                file=self.budget.folder,
                hint="run the same command again; layers that are done are kept",
            )

    @torch.no_grad()
    def logits(self, number: int, start: int, stop: int) -> Tensor:
        """The head's answer [sequences, stop - start, vocabulary] for a batch after `run`, places
        start:stop only.
        """
        batch = self.batches.batches[number]
        x = (
            torch.from_numpy(np.array(self.hidden.read(number)))
            .to(self.budget.device)
            .reshape(*batch.ids.shape, self.width)
        )
        return self.calls.leave(batch, x, torch.arange(start, stop))


class _Catch:
    """Stands in for a MoE block's forward: routes, runs the experts, and lets an onlooker see
    them; padding is left out.
    """

    def __init__(
        self, own: nn.Module, block: Block, look: Look | None, returns_logits: bool
    ) -> None:
        self.own, self.block, self.look = own, block, look
        self.returns_logits = returns_logits
        self.batch: Batch | None = None
        self._made: Tensor | None = None

    def __enter__(self) -> _Catch:
        self._was = self.own.forward
        self.own.forward = self._forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.own.forward = self._was  # type: ignore[method-assign]

    def _forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        assert self.batch is not None
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        padded = self.batch.tokens < len(flat)
        valid = torch.from_numpy(self.batch.valid).to(flat.device) if padded else None
        x = flat[valid] if valid is not None else flat
        routing = self.block.route(x)
        made = self.block.routed(
            x,
            routing,
            self.look.batch(self.batch.file, x, routing) if self.look is not None else None,
        )
        always = self.block.always(x)
        made = made if always is None else made + always
        whole = made
        if valid is not None:
            whole = torch.zeros_like(flat)
            whole[valid] = made
        self._made = whole
        out = whole.reshape(hidden_states.shape)
        return (out, routing.logits) if self.returns_logits else out

    def after(self, out: Tensor) -> None:
        """The layer's own output, for onlookers that compare the stream before and after the block."""
        if self.look is None or self._made is None or self.batch is None:
            return
        flat = out.reshape(-1, out.shape[-1])
        valid = torch.from_numpy(self.batch.valid).to(flat.device)
        self.look.after((flat - self._made)[valid], flat[valid])
