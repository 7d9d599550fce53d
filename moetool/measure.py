"""`profile` and `eval` as functions: look at a model with text, write no model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.field import FINE, WHAT
from moetool.methods.options import Common, Gate, Text, option, same
from moetool.progress import Progress, silent
from moetool.surgery.device import check_device

if TYPE_CHECKING:
    import numpy as np

    from moetool.forward.stats import Profile
    from moetool.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class Profiling:
    """What `profile` can be told."""

    calibrate: tuple[str, ...] = same(Text, "calibrate")
    tokens: int = same(Text, "tokens")
    seq_len: int = same(Text, "seq_len")
    pack: bool = same(Text, "pack")
    text_field: str = same(Text, "text_field")
    batch_tokens: int = same(Text, "batch_tokens")
    trust_remote_code: bool = same(Text, "trust_remote_code")
    sample: int = option(
        2048,
        "tokens of a layer on which all experts run, and whose inputs are kept",
        FINE,
        minimum=0,
    )
    covariance: bool = option(
        False,
        "keep second moments of inputs too, for whitening (large: hidden^2 + experts x width^2 "
        "numbers a layer)",
        WHAT,
    )
    seed: int = same(Common, "seed")
    memory: int | None = same(Common, "memory")
    device: str = same(Common, "device")


@dataclass(frozen=True)
class Evaluating:
    """What `eval` can be told."""

    text: tuple[str, ...] = same(
        Gate,
        "text",
        help="text: .txt, .jsonl, .parquet, a Hub dataset, or - for standard input; repeat it",
        panel=WHAT,
    )
    reference: str = option(
        "",
        "what it was made from: adds KL, top-1 agreement and flips",
        WHAT,
        metavar="ORIGINAL",
    )
    tokens: int = same(Text, "tokens", default=131_072, help="tokens, over all files")
    seq_len: int = same(Text, "seq_len")
    pack: bool = same(Text, "pack")
    text_field: str = same(Text, "text_field")
    batch_tokens: int = same(Text, "batch_tokens")
    trust_remote_code: bool = same(Text, "trust_remote_code")
    max_kl: float = same(
        Gate,
        "max_kl",
        help="exit code 4 when the KL divergence from --reference is larger (0: no gate)",
    )
    max_perplexity_increase: float | None = same(Gate, "max_perplexity_increase")
    memory: int | None = same(Common, "memory")
    device: str = same(Common, "device")

    @property
    def gate(self) -> Gate:
        """How far the model may be from the original."""
        return Gate(self.max_kl, self.max_perplexity_increase)


def profile(
    moe: str,
    stats: str,
    how: Profiling,
    *,
    tell: Progress = silent,
    stop: threading.Event | None = None,
) -> JsonObject:
    """Statistics of every expert on text, into the folder `stats`. Returns profile.json with a
    summary of each layer. Raises MoetoolError.
    """
    from moetool.forward import profile as profiling
    from moetool.forward.batches import Cut
    from moetool.forward.own import Running
    from moetool.forward.stats import Wanted

    check_device(how.device)
    said: list[str] = []
    checkpoint = _open(moe, said)
    cut = Cut(how.tokens, how.seq_len, how.pack, True, how.seed, how.batch_tokens)
    told = profiling.Calibration(how.calibrate, cut, how.text_field, how.trust_remote_code)
    made = profiling.make(
        checkpoint,
        moe,
        replace(told, running=Running(how.memory, how.device, tell, stop)),
        Wanted(1, how.sample, how.sample > 0, how.covariance),
        profiling.Making(Path(stats), memory=how.memory, device=how.device, tell=tell, stop=stop),
    )
    warnings = [*said, *made.facts["warnings"]]
    return made.facts | {"warnings": warnings} | _summary(made, checkpoint)


def _summary(made: Profile, checkpoint: Checkpoint) -> JsonObject:
    """A line a layer, super experts, and how the files differ."""
    from moetool.forward import profile as profiling
    from moetool.methods.reduce import protect
    from moetool.surgery.experts import Mixture

    mixture = Mixture.of(checkpoint)
    peaks = protect.found(made, mixture)
    return {
        "summary": [_row(made, n, mixture.count_in(n)) for n in made.facts["layers"]],
        "super_experts": {str(n): e for n, e in protect.by_layer(peaks).items()},
        "largest_outputs": [peak.as_json() for peak in peaks],
        "domains": profiling.domains(made, [f["name"] for f in made.facts["files"]]),
    }


def _row(made: Profile, number: int, experts: int) -> JsonObject:
    """What happened in one layer."""
    stats = made.layer(number)
    used = stats.total("count")[:experts] / max(1, stats.tokens)
    reap = stats.mean("reap")
    apart = None
    if stats.has("cosine") and experts > 1:
        apart = float(stats.cosine[~_diagonal(experts)].mean())
    return {
        "layer": number,
        "least_used": float(used.min()),
        "most_used": float(used.max()),
        "idle": int((used == 0).sum()),
        "max_out": float(stats.max_out.max()),
        "cosine": apart,
        "reap_least": float(reap.min()),
        "reap_most": float(reap.max()),
    }


def _diagonal(count: int) -> np.ndarray:
    import numpy as np

    return np.eye(count, dtype=bool)


def evaluate(
    model: str,
    how: Evaluating,
    *,
    tell: Progress = silent,
    stop: threading.Event | None = None,
) -> JsonObject:
    """Perplexity of a model on text; with a reference KL, top-1 agreement and flips. Raises
    VerificationFailed when a gate is missed.
    """
    if how.gate.gated and not how.reference:
        raise UsageError(
            "a gate compares with the original",
            expected="--reference ORIGINAL",
            hint="give what the model was made from",
        )
    import tempfile

    from moetool.evaluate import gate, perplexity
    from moetool.forward.batches import Cut
    from moetool.forward.profile import Calibration

    cut = Cut(how.tokens, how.seq_len, how.pack, False, 0, how.batch_tokens)
    check_device(how.device)
    said: list[str] = []
    opened = _open(model, said)
    reference = _open(how.reference, said) if how.reference else None
    with tempfile.TemporaryDirectory(
        prefix="moetool-", dir=None if how.memory is None else "."
    ) as folder:
        found = perplexity.evaluate(
            opened,
            Calibration(how.text, cut, how.text_field, how.trust_remote_code, "text"),
            reference=reference,
            room=perplexity.Room(how.memory, Path(folder) if how.memory else None, how.device),
            tell=tell,
            stop=stop,
        )
    notes = [*said, *found["notes"]]
    found = {"model": model, "reference": how.reference or None, **found, "notes": notes}
    gate.check(found, how.gate, model)
    return found


def _open(name: str, said: list[str]) -> Checkpoint:
    """A model that holds all it should; what could not be counted is `said`."""
    from moetool.surgery import complete, source
    from moetool.surgery.checkpoint import Checkpoint

    made = Checkpoint.open(source.locate(name))
    said += complete.check([made])
    return made
