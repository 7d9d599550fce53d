"""How much a model minds that some of its matrices are rounded: measured, never written.

With text: KL of the answers on a sample of it, one walk a question. Without: the squared error of
the weights, which says less.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from moetool import atomic
from moetool.forward import answers
from moetool.forward import profile as profiling
from moetool.forward.batches import Cut
from moetool.forward.own import Running
from moetool.forward.profile import Calibration
from moetool.forward.stats import Wanted
from moetool.forward.walk import Budget, Walk
from moetool.methods.contract import Settings
from moetool.methods.quantize.choice import Choice
from moetool.methods.quantize.options import Quantizing
from moetool.methods.quantize.rounded import RoundedView, held
from moetool.progress import Progress, Stage
from moetool.surgery.checkpoint import Checkpoint

SAMPLED = 24  # matrices of a role whose weights are looked at
_WORK = 24  # bytes of memory a weight that is being rounded


class Meter(Protocol):
    """Answers what rounding costs; smaller is better."""

    unit: str
    tokens: int
    peak: int

    def __call__(self, name: str, choice: Choice) -> float: ...


class ByText:
    """KL(source || rounded) in nats on a sample of the calibration text. What was measured is kept
    in the work folder: a run that goes on measures only the rest.
    """

    unit = "KL"

    def __init__(self, source: Checkpoint, verb: Quantizing, settings: Settings) -> None:
        self.source, self.settings = source, settings
        tokens = min(verb.tokens, verb.fit_tokens)
        length = min(verb.seq_len, tokens)
        cut = Cut(tokens, length, verb.pack, True, settings.seed, verb.batch_tokens)
        told = Calibration(verb.calibrate, cut, verb.text_field, verb.trust_remote_code)
        told = replace(told, running=Running(settings.memory, settings.device, settings.tell))
        self.batches = told.read(source)
        self.tokens, self.peak = self.batches.total, 0
        folder = Path(settings.work) / "fit"
        seal = profiling.digest(source, self.batches, Wanted(len(self.batches.files)), "fit")
        profiling.claim(folder, seal)
        self._file = folder / "measured.json"
        self._known: dict[str, float] = {}
        if self._file.exists():
            self._known = dict(json.loads(self._file.read_text()))
        self._reference: Walk | None = None

    def __call__(self, name: str, choice: Choice) -> float:
        if name not in self._known:
            self._known[name] = self._measured(RoundedView.of(self.source, choice))
            atomic.write(self._file, json.dumps(self._known))
        return self._known[name]

    def _measured(self, model: Checkpoint) -> float:
        reference = self._reference = self._reference or self._walked(self.source, 0)
        walk = self._walked(model, reference.retained)
        sums = answers.Sums()
        for number in range(len(self.batches.batches)):
            sums.add(answers.of([reference, walk], number))
        return sums.kl / max(1, sums.predictions)

    def _walked(self, model: Checkpoint, retained: int) -> Walk:
        widest = max((t.elements for t in model.tensors.values() if len(t.shape) == 2), default=0)
        extra = retained + 2 * answers.LOGIT_BYTES + _WORK * widest
        limit, folder = self.settings.memory, None
        if limit is not None:  # then what layers put out may be laid down
            folder = Path(self.settings.work) / "fit" / ("model" if retained else "reference")
        budget = Budget(limit, folder, self.settings.device, extra=extra)
        walk = Walk(model, self.batches, budget, tell=_silent, stop=self.settings.stop, name="fit")
        walk.run()
        self.peak = max(self.peak, walk.peak)
        return walk


def _silent(stage: Stage, done: int, total: int) -> None:
    """The questions are counted, not their layers."""


class ByWeights:
    """The mean squared error of weights relative to their own square, times how many there are:
    what can be said without text. Of each role some matrices are looked at.
    """

    unit = "squared error"
    tokens = 0
    peak = 0

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self._known: dict[str, float] = {}

    def __call__(self, name: str, choice: Choice) -> float:
        if name not in self._known:
            roles = {choice.matrices[n].role for n in choice.formats}
            self._known[name] = sum(self._role(role, choice) for role in sorted(roles))
        return self._known[name]

    def _role(self, role: str, choice: Choice) -> float:
        names = [n for n in choice.formats if choice.matrices[n].role == role]
        error = norm = 0.0
        for name in names[:: -(-len(names) // SAMPLED)]:
            matrix = self.source.matrix(choice.matrices[name].piece).float()
            error += float((held(matrix, choice.formats[name]) - matrix).square().sum())
            norm += float(matrix.square().sum())
        weights = sum(choice.matrices[n].piece.count for n in names)
        everything = sum(m.piece.count for m in choice.matrices.values())
        return error / max(norm, 1e-30) * weights / everything


def meter(source: Checkpoint, verb: Quantizing, settings: Settings) -> Meter:
    """By text where there is some."""
    return ByText(source, verb, settings) if verb.calibrate else ByWeights(source)


def told(tell: Progress, done: int, total: int) -> None:
    """How many questions were asked."""
    tell(Stage("fit", "layers"), done, total)
