"""What models answer to text that went through them, as sums: loss, and how far the last model is
from the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.forward.walk import Walk
    from moetool.forward.whole import WholeModel

LOGIT_BYTES = 256 << 20  # of logits held at once


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


def of(walks: list[Walk | WholeModel], number: int) -> Sums:
    """All predictions of a batch of the last walk, held against those of the first where there are
    two; as many places of the sequences at a time as LOGIT_BYTES allow.
    """
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
            .reshape(-1, _vocabulary(w, vocab))[counted]
            .float()
            .log_softmax(-1)
            .cpu()
            for w in walks
        ]
        sums.add(_compare(answers, ids[:, start + 1 : stop + 1].reshape(-1)[counted]))
    return sums


def _vocabulary(walk: Walk | WholeModel, expected: int) -> int:
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
