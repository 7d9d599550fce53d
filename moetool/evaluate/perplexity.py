"""Perplexity of a model on text, and how far it is from a reference: one layer in memory at a
time, whatever the model's size (whole, where only moetool runs it).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError, VerificationFailed
from moetool.forward import answers
from moetool.forward.answers import LOGIT_BYTES, Sums
from moetool.forward.batches import Batches
from moetool.forward.profile import Calibration
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moetool.forward.walk import Budget, Walk
    from moetool.forward.whole import WholeModel


@dataclass(frozen=True)
class Room:
    """What measuring may hold, where it may spill, and where it runs."""

    memory: int | None = None
    folder: Path | None = None
    device: str = "cpu"

    def budget(self, name: str, held: int) -> Budget:
        """Of the walk of this name, while `held` bytes are taken already."""
        from moetool.forward.walk import Budget

        at = None if self.folder is None else self.folder / name
        return Budget(self.memory, at, self.device, extra=held)


ANY_ROOM = Room()


def evaluate(
    model: Checkpoint,
    calibration: Calibration,
    *,
    reference: Checkpoint | None = None,
    room: Room = ANY_ROOM,
    tell: Progress = silent,
    stop: threading.Event | None = None,
) -> JsonObject:
    """Perplexity for each file and over all; with a reference also KL, top-1 agreement and flips.
    One layer in memory at a time, but for models with groups of experts, which are held whole.
    Sequences are scored one by one from their second token on. Raises MoetoolError when the two
    models do not share a vocabulary.
    """
    batches = calibration.read(model if reference is None else reference)
    walks: list[Walk | WholeModel] = []
    for name, checkpoint in (("reference", reference), ("model", model)):
        if checkpoint is not None:
            held = 2 * LOGIT_BYTES + sum(w.retained for w in walks)
            walks.append(_walked(name, checkpoint, batches, room.budget(name, held), tell, stop))
    sums = _sums(walks, batches, tell, stop)
    everything = Sums()
    for s in sums:
        everything.add(s)
    _check_finite(everything, model, reference)
    rows = [
        {"file": n, **s.row(reference is not None)}
        for n, s in zip(batches.files, sums, strict=True)
    ]
    return {
        "files": rows,
        **everything.row(reference is not None),
        "seq_len": batches.seq_len,
        "data_sha256": batches.digest,
        "notes": list(batches.notes),
        "peak_memory": max(w.peak for w in walks),
    }


def _walked(
    name: str,
    checkpoint: Checkpoint,
    batches: Batches,
    budget: Budget,
    tell: Progress,
    stop: threading.Event | None,
) -> Walk | WholeModel:
    """A model through which all text has gone."""
    from moetool.forward.walk import Walk
    from moetool.forward.whole import WholeModel
    from moetool.surgery.text_model import text_model

    at = text_model(checkpoint.config)
    kind = WholeModel if at.groups or at.calibration else Walk
    walk = kind(checkpoint, batches, budget, tell=tell, stop=stop, name=f"eval {name}")
    walk.run()
    return walk


def _sums(
    walks: list[Walk | WholeModel], batches: Batches, tell: Progress, stop: threading.Event | None
) -> list[Sums]:
    """The sums of each file, batch after batch through the heads."""
    sums = [Sums() for _ in batches.files]
    total = sum(b.ids.size for b in batches.batches)
    done = 0
    for number, batch in enumerate(batches.batches):
        if stop is not None and stop.is_set():
            walks[-1].maybe_stop()
        sums[batch.file].add(answers.of(walks, number))
        done += batch.ids.size
        tell(Stage("eval head", "tokens"), done, total)
    return sums


def _check_finite(sums: Sums, model: Checkpoint, reference: Checkpoint | None) -> None:
    """A model whose answers are no numbers has no perplexity, and no gate could hold it back."""
    for at, losses in ((reference, (sums.reference_loss,)), (model, (sums.loss, sums.kl))):
        if at is not None and any(math.isnan(x) or math.isinf(x) for x in losses):
            kind = VerificationFailed if at is model and reference is not None else MoetoolError
            raise kind(
                "the model's answers are NaN or infinite",
                file=at.folder,
                expected="finite logits",
                hint="a weight is NaN or inf, or too large: --strict names the tensor",
            )
