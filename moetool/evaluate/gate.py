"""Gates for CI: is a smaller model still near enough to its source? Measured before anything is
there to load.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.data import JsonObject
from moetool.errors import UsageError, VerificationFailed
from moetool.evaluate.perplexity import evaluate
from moetool.forward.batches import Cut
from moetool.forward.profile import Calibration
from moetool.methods.contract import Prepared
from moetool.methods.options import Gate
from moetool.progress import Progress
from moetool.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class Limit:
    """One gate: the measured value must not be above it."""

    name: str
    key: str  # in what was measured
    most: float | None  # None: no gate
    shown: str

    def check(self, found: Mapping[str, Any], where: str) -> None:
        """Raise VerificationFailed (exit code 4) when the value is too large, or no number."""
        value = found.get(self.key)
        if self.most is not None and value is not None and not value <= self.most:
            raise VerificationFailed(
                f"the {self.name} from the source is too large",
                file=where,
                expected=f"at most {self.shown.format(self.most)}",
                found=self.shown.format(value),
                hint="remove less (--ratio), try --refit or another method, or raise the gate",
            )


def check(found: Mapping[str, Any], gate: Gate, where: str) -> None:
    """Hold what was measured against every gate; VerificationFailed for the first that is missed."""
    for limit in (
        Limit("KL divergence", "kl", gate.max_kl or None, "{:.4g}"),
        Limit("perplexity increase", "perplexity_increase", gate.max_perplexity_increase, "{:.2%}"),
    ):
        limit.check(found, where)


def measure(
    prepared: Prepared, written: Checkpoint, *, tell: Progress, stop: threading.Event | None
) -> JsonObject:
    """Evaluate finished shards against their source on --text (or the calibration text) and hold
    them against the gates.
    """
    options, text, gate = prepared.options, prepared.method.text, prepared.method.gate
    assert gate is not None
    files = gate.text or text.calibrate
    if not files:
        raise UsageError(
            "a gate needs text to measure on",
            expected="--text FILE or --calibrate FILE",
            hint="give held-out text: --text test.jsonl",
        )
    said = options.common
    cut = Cut(gate.text_tokens, text.seq_len, True, False, said.seed, text.batch_tokens)
    out = Path(options.out).absolute()
    folder = out.parent / f".{out.name}.moetool-work" / "gate"
    found = evaluate(
        written,
        Calibration(files, cut, text.text_field),
        reference=prepared.sources[0],
        memory=said.memory,
        folder=folder if said.memory else None,
        device=said.device,
        tell=tell,
        stop=stop,
    )
    found["held_out"] = bool(gate.text)
    check(found, gate, options.out)
    return found
