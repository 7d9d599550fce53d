"""Gradients of the text's loss, from the last layer down: one layer's weights and one batch's graph
in memory at a time. A walk up keeps what goes into every layer in files; the way back runs each
layer once more and hands the gradient down through a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moetool import atomic
from moetool.errors import MoetoolError
from moetool.forward import stock
from moetool.forward.batches import Batch, Batches
from moetool.forward.catch import Catch
from moetool.forward.walk import Walk
from moetool.progress import Stage
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.text_model import text_model

Tensor = torch.Tensor
LOGITS = 1 << 23  # numbers of logits at once
# float32 vectors that a token's graph of one layer holds: of the hidden size, and of the FFN's
PER_HIDDEN, PER_WIDTH = 40, 10


class FfnPass(NamedTuple):
    """Real tokens of a batch at a layer's FFN: what goes in [tokens, hidden], what goes into its
    last linear [tokens, width], and the gradient of the loss by that.
    """

    x: Tensor
    h: Tensor
    gradient: Tensor


class Ends(NamedTuple):
    """The names in the file of an FFN's first and last linear."""

    first: str
    last: str


class Kept(Walk):
    """A walk that keeps what goes into every layer, for the way back (`Back`)."""

    def _one(self, layer: int, number: int, catch: Catch | None) -> Tensor:
        _write(self._file(layer), self.hidden.starts, number, self.hidden.read(number))
        return super()._one(layer, number, catch)

    def _file(self, layer: int) -> Path:
        assert self.budget.folder is not None
        return self.budget.folder / f"layer-{layer:05d}.in"

    def into(self, layer: int, number: int) -> Tensor:
        """What went into a layer [sequences, length, hidden]."""
        return self.shaped(_read(self._file(layer), self.hidden.starts, number, self.width), number)

    def shaped(self, rows: np.ndarray, number: int) -> Tensor:
        """Rows of a batch as [sequences, length, hidden], where the model computes."""
        shape = self.batches.batches[number].ids.shape
        made = torch.from_numpy(rows.copy()).to(self.budget.device)
        return made.reshape(*shape, self.width)


class Back:
    """The way back over a walk that is through. What an earlier run did is taken up."""

    def __init__(self, walk: Kept) -> None:
        assert walk.budget.folder is not None
        self.walk, self.folder = walk, walk.budget.folder
        self.count = len(walk.shell.layers)

    @staticmethod
    def begun(folder: Path) -> int | None:
        """The layer whose input's gradient is there; None where the way back has not begun."""
        found = sorted(folder.glob("layer-*.back"))
        return int(found[0].stem.partition("-")[2]) if found else None

    def run(
        self, ends: Callable[[int], Ends], see: Callable[[int, Iterator[FfnPass]], None]
    ) -> None:
        """Show `see` the FFN of every layer, from the last to the first, batch by batch."""
        with stock.running(self.walk.source.folder):
            layer = self.begun(self.folder)
            if layer is None:
                self._head()
                layer = self.count
            stage = Stage("gradients", "layers")
            while layer > 0:
                self.walk.tell(stage, self.count - layer, self.count)
                layer -= 1
                self._layer(layer, ends(layer), see)
            self.walk.tell(stage, self.count, self.count)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.back"

    def _head(self) -> None:
        """The gradient of the mean cross entropy by what the last layer gives."""
        walk, file = self.walk, self._file(self.count)
        total = sum(int((batch.lengths - 1).clip(0).sum()) for batch in walk.batches.batches)
        if not total:
            raise MoetoolError(
                "the text has nothing to predict",
                expected="sequences of two tokens or more",
                found=f"{walk.batches.total} tokens",
                hint="give more text, or a larger --seq-len",
            )
        with atomic.writing(file) as temporary:
            for number, batch in enumerate(walk.batches.batches):
                walk.maybe_stop()
                x = walk.last(number).requires_grad_()
                made = torch.zeros_like(x)
                for start, stop in _cuts(batch, walk.source):
                    with torch.enable_grad():
                        loss = self._loss(batch, x, start, stop) / total
                    made += torch.autograd.grad(loss, x)[0]
                _write(
                    temporary,
                    walk.hidden.starts,
                    number,
                    made.reshape(-1, walk.width).numpy(force=True),
                )

    def _loss(self, batch: Batch, x: Tensor, start: int, stop: int) -> Tensor:
        """The sum of the cross entropy of what follows the places start:stop."""
        logits = self.walk.calls.leave(batch, x, torch.arange(start, stop)).float()
        places = np.arange(start + 1, stop + 1)
        real = places[None, :] < batch.lengths[:, None]
        wanted = batch.ids[:, np.minimum(places, batch.ids.shape[1] - 1)]
        target = torch.from_numpy(np.where(real, wanted, -100)).to(x.device)
        return functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")

    def _layer(self, layer: int, ends: Ends, see: Callable[[int, Iterator[FfnPass]], None]) -> None:
        self.walk.shell.fill(layer)
        with atomic.writing(self._file(layer)) as temporary:
            see(layer, self._batches(layer, ends, temporary))
        self._file(layer + 1).unlink(missing_ok=True)
        self.walk.shell.empty(layer)

    def _batches(self, layer: int, ends: Ends, file: Path) -> Iterator[FfnPass]:
        walk, (first, last) = self.walk, self._modules(layer, ends)
        seen: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[module] = args[0]

        hooks = [module.register_forward_pre_hook(note) for module in (first, last)]
        try:
            for number, batch in enumerate(walk.batches.batches):
                walk.maybe_stop()
                x = walk.into(layer, number).requires_grad_()
                args, kwargs = walk.calls.of(batch, layer)
                with torch.enable_grad():
                    made = walk.shell.layers[layer](x, *args, **kwargs)
                out = made[0] if isinstance(made, tuple) else made
                given = _read(self._file(layer + 1), walk.hidden.starts, number, walk.width)
                down, inside = torch.autograd.grad(out, [x, seen[last]], walk.shaped(given, number))
                rows = down.reshape(-1, walk.width).numpy(force=True)
                _write(file, walk.hidden.starts, number, rows)
                yield FfnPass(*(_real(t, batch) for t in (seen[first], seen[last], inside)))
        finally:
            for hook in hooks:
                hook.remove()

    def _modules(self, layer: int, ends: Ends) -> tuple[nn.Module, nn.Module]:
        """The two linears. MoetoolError where the class has them as something else."""
        shell, module = self.walk.shell, self.walk.shell.layers[layer]
        stem = f"{shell.stack}.{layer}."
        found = {
            shell.disk.get(f"{stem}{name}.weight"): one
            for name, one in module.named_modules()
            if isinstance(one, nn.Linear)
        }
        missing = [name for name in ends if name not in found]
        if missing:
            raise MoetoolError(
                "an FFN's linears are no linears of the model's class",
                file=self.walk.source.folder,
                tensor=missing[0],
                expected="one tensor for each linear",
                found="none of this name",
                hint="use --carve kmeans:gate, which looks at weights alone",
            )
        return found[ends.first], found[ends.last]


def held(source: Checkpoint, batches: Batches, hidden: int, width: int) -> int:
    """Bytes that the way back holds beside a walk: a layer's graph of the largest batch, and the
    logits of a part of it.
    """
    tokens: int = max(batch.ids.size for batch in batches.batches)
    sequences: int = max(batch.ids.shape[0] for batch in batches.batches)
    graph = 4 * tokens * (PER_HIDDEN * hidden + PER_WIDTH * width)
    return graph + 4 * 5 * max(LOGITS, sequences * _vocabulary(source))


def _cuts(batch: Batch, source: Checkpoint) -> Iterator[tuple[int, int]]:
    """Places whose logits are there at once."""
    each = max(1, LOGITS // (batch.ids.shape[0] * _vocabulary(source)))
    for start in range(0, batch.ids.shape[1], each):
        yield start, min(start + each, batch.ids.shape[1])


def _vocabulary(source: Checkpoint) -> int:
    return max(1, int(str(text_model(source.config).text.get("vocab_size") or 1)))


def _real(x: Tensor, batch: Batch) -> Tensor:
    """Without padding [tokens, ...], detached."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat[torch.from_numpy(batch.valid).to(flat.device)]


def _write(file: Path, starts: np.ndarray, number: int, rows: np.ndarray) -> None:
    """A batch's rows [rows, hidden] at their place in a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        at = 4 * int(starts[number]) * rows.shape[1]
        os.pwrite(descriptor, np.ascontiguousarray(rows, np.float32).data.cast("B"), at)
    finally:
        os.close(descriptor)


def _read(file: Path, starts: np.ndarray, number: int, width: int) -> np.ndarray:
    """A batch's rows [rows, hidden]."""
    start, stop = (int(n) for n in starts[number : number + 2])
    with file.open("rb") as opened:
        opened.seek(4 * start * width)
        return np.frombuffer(opened.read(4 * (stop - start) * width), np.float32).reshape(-1, width)
