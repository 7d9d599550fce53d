"""Perplexity of a model on text, and how far it is from a reference: one layer in memory at a
time, whatever the model's size.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError, VerificationFailed
from moetool.forward.batches import Batches
from moetool.forward.profile import Calibration
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.forward.walk import Budget, Walk

LOGIT_BYTES = 256 << 20  # of logits held at once


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


@dataclass
class Sums:
    """float64 sums over the predictions of one file."""

    predictions: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    same: int = 0
    flips: int = 0
    right: int = 0

    def add(self, other: Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self, with_reference: bool) -> JsonObject:
        """What is reported: perplexity; with a reference KL(reference || model) in nats, top-1
        agreement, and flips, the share of places where exactly one of the two predicts the right
        token (arXiv 2407.09141).
        """
        n = max(1, self.predictions)
        found: JsonObject = {
            "tokens": self.predictions,
            "perplexity": _exp(self.loss / n),
            "accuracy": self.right / n,
        }
        if with_reference:
            found |= {
                "reference_perplexity": _exp(self.reference_loss / n),
                "perplexity_increase": _exp((self.loss - self.reference_loss) / n) - 1.0,
                "kl": self.kl / n,
                "top1_agreement": self.same / n,
                "flips": self.flips / n,
            }
        return found


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


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
    Sequences are scored one by one from their second token on. Raises MoetoolError when the two
    models do not share a vocabulary.
    """
    batches = calibration.read(model if reference is None else reference)
    walks: list[Walk] = []
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
) -> Walk:
    """A model through which all text has gone."""
    from moetool.forward.walk import Walk

    walk = Walk(checkpoint, batches, budget, tell=tell, stop=stop, name=f"eval {name}")
    walk.run()
    return walk


def _sums(
    walks: list[Walk], batches: Batches, tell: Progress, stop: threading.Event | None
) -> list[Sums]:
    """The sums of each file, batch after batch through the heads."""
    sums = [Sums() for _ in batches.files]
    total = sum(b.ids.size for b in batches.batches)
    done = 0
    for number, batch in enumerate(batches.batches):
        if stop is not None and stop.is_set():
            walks[-1]._maybe_stop()
        sums[batch.file].add(_batch(walks, number))
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


def _batch(walks: list[Walk], number: int) -> Sums:
    """All predictions of a batch, as many places of the sequences at a time as LOGIT_BYTES allow."""
    import torch

    batch = walks[-1].batches.batches[number]
    count, length = batch.ids.shape
    vocab = walks[-1].shell.model.get_output_embeddings().weight.shape[0]
    step = max(1, LOGIT_BYTES // (4 * 3 * len(walks) * vocab * count))
    ids, lengths = torch.from_numpy(batch.ids), torch.from_numpy(batch.lengths)
    sums = Sums()
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        counted = (torch.arange(start, stop)[None, :] + 1 < lengths[:, None]).reshape(-1)
        if not bool(counted.any()):
            break
        answers = [
            w.logits(number, start, stop)
            .reshape(-1, vocab_of(w, vocab))[counted]
            .float()
            .log_softmax(-1)
            .cpu()
            for w in walks
        ]
        sums.add(_compare(answers, ids[:, start + 1 : stop + 1].reshape(-1)[counted]))
    return sums


def vocab_of(walk: Walk, expected: int) -> int:
    """A model's number of logits; MoetoolError when it is not the other's."""
    found = int(walk.shell.model.get_output_embeddings().weight.shape[0])
    if found != expected:
        raise MoetoolError(
            "model and reference do not share a vocabulary",
            file=walk.source.folder,
            expected=f"{expected} tokens",
            found=found,
            hint="give the model it was made from",
        )
    return found


def _compare(answers: list[Tensor], right: Tensor) -> Sums:
    mine = answers[-1]
    top = mine.argmax(-1)
    hit = top == right
    sums = Sums(
        len(right), float(-mine.gather(-1, right[:, None]).double().sum()), right=int(hit.sum())
    )
    if len(answers) > 1:
        theirs = answers[0]
        other = theirs.argmax(-1)
        other_hit = other == right
        sums.reference_loss = float(-theirs.gather(-1, right[:, None]).double().sum())
        sums.kl = float((theirs.exp() * (theirs - mine)).sum(-1).double().sum())
        sums.same, sums.flips = int((top == other).sum()), int((hit != other_hit).sum())
    return sums
