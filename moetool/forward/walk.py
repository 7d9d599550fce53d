"""The walk: every batch through one layer, then the next; one layer's weights in memory at a time.

A MoE block's input is caught and the block computed by kernels/moe.py, which shows each expert at
work; on the first batch of the first MoE layer the family's own block must agree.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetool.errors import MoetoolError
from moetool.forward import block as blocks
from moetool.forward import finite, stock
from moetool.forward.adapter import Shell
from moetool.forward.batches import Batch, Batches
from moetool.forward.block import Block
from moetool.forward.calls import Calls
from moetool.forward.catch import Catch, Look
from moetool.forward.hidden import Hidden
from moetool.forward.linears import Linears, Observer
from moetool.forward.needs import compared_experts, needs
from moetool.forward.through import TextThrough
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.text_model import text_model

Tensor = torch.Tensor
COMPARED = 256  # tokens on which the family's own block is asked
# largest difference from the family's own block, relative to its largest output, float32
AGREE = 2e-4
# What a layer put out is kept for resuming while a walk is young, and whenever the layer took long:
# writing it must not cost more than passing the text again.
KEPT_FIRST, KEPT_LONG = 5.0, 0.5  # seconds


Change = Callable[[int, Block], Block | None]


@dataclass(frozen=True)
class Budget:
    """What the walk may hold, and where it may spill and resume. `memory` None: as much as it
    needs. `widened`: experts must be held in float32 (somebody gives them new weights). `extra`:
    bytes that an onlooker holds beside a layer; part of the promise.
    """

    memory: int | None = None
    folder: Path | None = None
    device: str = "cpu"
    widened: bool = False
    extra: int = 0


@dataclass(frozen=True)
class Eyes:
    """Who looks at a layer and who changes it. look: MoE blocks at work; change: a block gives
    another; watch: every linear of every layer, some of which get new weights.
    """

    look: Look | None = None
    change: Change | None = None
    watch: Observer | None = None

    @property
    def changing(self) -> bool:
        """Whether a layer is passed again, changed, before the next one is."""
        return self.change is not None or (self.watch is not None and self.watch.changes)


class Walk(TextThrough):
    """One model and its text. `run` sends everything through; afterwards `logits` gives the head's
    answer batch by batch.
    """

    kept = "; layers that are done are kept"

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
        self.tell, self.name = tell, name
        self.stop = stop or threading.Event()
        at = text_model(source.config)
        self.mixture = Mixture.of(source) if at.layout.kind == "moe" else None
        needed = needs(source, batches, extra=budget.extra)
        fit = needed.fit(budget.memory, widened=budget.widened)
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
        self._batch = batches.batches[0]  # the one in work

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

    @property
    def mixtures(self) -> list[int]:
        """The layers that hold experts."""
        return list(self._experts)

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
    def run(
        self, look: Look | None = None, change: Change | None = None, watch: Observer | None = None
    ) -> None:
        """Send every batch through all layers. `change` may give a layer another block after it
        was looked at, `watch` new weights; the layers above then see its output. With a folder the
        walk goes on where an earlier one stopped.
        """
        try:
            with stock.running(self.source.folder):
                self._run(Eyes(look, change, watch))
        except OSError as problem:
            raise MoetoolError(
                f"a walk cannot go on: {problem.strerror or problem}",
                file=problem.filename or self.budget.folder or self.source.folder,
                hint="mend the cause (free space?) and run the same command again; layers that are done are kept",
            ) from None

    def _run(self, eyes: Eyes) -> None:
        self.shell.fill(None)
        if not self.hidden.resume():
            self._embed()
        count, begun = len(self.shell.layers), time.monotonic()
        stage = Stage(self.name, "layers")
        for layer in range(self.hidden.layer, count):
            self.tell(stage, layer, count)
            took = time.monotonic()
            self._layer(layer, eyes)
            now = time.monotonic()
            self.hidden.end(keep=now - took > KEPT_LONG or now - begun < KEPT_FIRST)
        self.tell(stage, count, count)

    def _embed(self) -> None:
        """The first layer's input of every batch."""
        self.hidden.first()
        for number, batch in enumerate(self.batches.batches):
            self.maybe_stop()
            self.hidden.write(number, self.calls.enter(batch).reshape(-1, self.width).cpu().numpy())
        self.hidden.end(keep=False)

    def _layer(self, layer: int, eyes: Eyes) -> None:
        catch = self._filled(layer, eyes.look)
        inside = self._block_name(layer) if catch is not None else None
        linears = Linears(self.shell, layer, inside, self.mixture) if eyes.watch else None
        with contextlib.ExitStack() as open_:
            if catch is not None:
                open_.enter_context(catch)
            self._looked_at(layer, catch, linears, eyes)
            self._changed(layer, catch, linears, eyes)
            while eyes.watch is not None and eyes.watch.again:
                self._looked_at(layer, catch, linears, Eyes(watch=eyes.watch))
                self._changed(layer, catch, linears, Eyes(watch=eyes.watch))
            if eyes.changing:
                self._pass(layer, catch, store=True)
        self.shell.empty(layer)

    def _filled(self, layer: int, look: Look | None) -> Catch | None:
        """Read a layer's weights; returns its block, where it has one."""
        if layer not in self._experts:
            self.shell.fill(layer)
            return None
        assert self.mixture is not None
        own = self.shell.layers[layer].get_submodule(self._block_name(layer))
        if not self._checked and self.mixture.count_in(layer) == self.mixture.experts:
            self._compare(layer)
            self._checked = True
        block = blocks.read(self.mixture, layer, device=self.budget.device, widen=self.widen)
        self.shell.fill(layer, skip=self._experts[layer])
        return Catch(own, block, look, self.mixture.layout.overlay.returns_logits)

    def _looked_at(
        self, layer: int, catch: Catch | None, linears: Linears | None, eyes: Eyes
    ) -> None:
        """The first pass, seen by everybody."""
        look, watch = eyes.look if catch is not None else None, eyes.watch
        if look is not None and catch is not None:
            look.begin(layer, catch.block, self.batches.total)
        with contextlib.ExitStack() as open_:
            if watch is not None and linears is not None:
                watch.begin(layer, list(linears))
                open_.enter_context(linears.watched(watch, lambda: self._batch))
                if catch is not None:
                    catch.also = partial(linears.inside, watch, catch.block)
            self._pass(layer, catch, store=not eyes.changing)
        if look is not None:
            look.end()

    def _changed(
        self, layer: int, catch: Catch | None, linears: Linears | None, eyes: Eyes
    ) -> None:
        """Ask for what was solved and put it in its place; nobody looks from here on."""
        block = catch.block if catch is not None else None
        if eyes.watch is not None and linears is not None:
            new = eyes.watch.end(layer, block)
            block = linears.put(new, block) if new else block
        if catch is None or block is None:
            return
        if eyes.change is not None:
            block = eyes.change(layer, block) or block
        catch.look, catch.also, catch.block = None, None, block

    def _pass(self, layer: int, catch: Catch | None, *, store: bool) -> None:
        """All batches through one layer; `store` keeps the output as the next layer's input."""
        self.hidden.begin()
        for number, batch in enumerate(self.batches.batches):
            self.maybe_stop()
            self._batch = batch
            if catch is not None:
                catch.batch = batch
            made = self._one(layer, number, catch)
            if store:
                self.hidden.write(number, made.reshape(-1, self.width).cpu().numpy())

    def _one(self, layer: int, number: int, catch: Catch | None) -> Tensor:
        batch = self.batches.batches[number]
        x = (
            torch.from_numpy(np.array(self.hidden.read(number)))
            .to(self.budget.device)
            .reshape(*batch.ids.shape, self.width)
        )
        args, kwargs = self.calls.of(batch, layer)
        made = self.shell.layers[layer](x, *args, **kwargs)
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
        finite.check(self.source.folder, layer, input=seen, output=theirs)
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

    def last(self, number: int) -> Tensor:
        shape = self.batches.batches[number].ids.shape
        held = torch.from_numpy(np.array(self.hidden.read(number)))
        return held.to(self.budget.device).reshape(*shape, self.width)
