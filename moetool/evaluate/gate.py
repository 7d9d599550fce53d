"""Gates for CI: is a smaller model still near enough to its source? Measured before anything is
there to load.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from moetool.data import JsonMapping, JsonObject
from moetool.errors import UsageError, VerificationFailed
from moetool.evaluate.perplexity import Room, evaluate
from moetool.forward.answers import LOGIT_BYTES
from moetool.forward.batches import Cut
from moetool.forward.needs import needs
from moetool.forward.profile import Calibration
from moetool.methods.contract import Method
from moetool.methods.options import Common, Gate
from moetool.methods.prepared import Prepared
from moetool.progress import Progress
from moetool.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class Limit:
    """One gate: the measured value must not be above it."""

    name: str
    key: str  # in what was measured
    most: float | None  # None: no gate
    shown: str

    def check(self, found: JsonMapping, where: str) -> None:
        """Raise VerificationFailed (exit code 4) when the value is too large, or no number."""
        value = found.get(self.key)
        if self.most is not None and value is not None and not value <= self.most:
            raise VerificationFailed(
                f"the {self.name} from the source is too large",
                file=where,
                expected=f"at most {self.shown.format(self.most)}",
                found=self.shown.format(value),
                hint="ask for less, try another method, or raise the gate",
            )


def check(found: JsonMapping, gate: Gate, where: str) -> None:
    """Hold what was measured against every gate; VerificationFailed for the first that is missed."""
    for limit in (
        Limit("KL divergence", "kl", gate.max_kl or None, "{:.4g}"),
        Limit("perplexity increase", "perplexity_increase", gate.max_perplexity_increase, "{:.2%}"),
    ):
        limit.check(found, where)


def promise(source: Checkpoint, method: Method, common: Common) -> int:
    """Peak bytes of measuring; 0 where nothing is. Text that cannot be read, and --memory that is
    too small, are said here, before any work: what is measured is no larger than its source.
    """
    if method.gate is None:
        return 0
    read = _text(method, common).read(source)
    held = 2 * LOGIT_BYTES
    first = needs(source, read, extra=held)
    fit = first.fit(common.memory)
    retained = first.outside + (0 if fit.spill else first.hidden)
    return needs(source, read, extra=held + retained).fit(common.memory).peak


def _text(method: Method, common: Common) -> Calibration:
    """--text, or the calibration text, as it is cut for measuring."""
    text, gate = method.text, method.gate
    assert gate is not None
    files = gate.text or text.texts
    if not files:
        raise UsageError(
            "a gate needs text to measure on",
            expected="--text FILE or --calibrate FILE",
            hint="give held-out text: --text test.jsonl",
        )
    cut = Cut(gate.text_tokens, text.seq_len, True, False, common.seed, text.batch_tokens)
    return Calibration(files, cut, text.text_field, text.trust_remote_code)


def measure(
    prepared: Prepared, written: Checkpoint, *, tell: Progress, stop: threading.Event | None
) -> JsonObject:
    """Evaluate finished shards against their source on --text (or the calibration text) and hold
    them against the gates.
    """
    options, gate = prepared.options, prepared.method.gate
    assert gate is not None
    said = options.common
    found = evaluate(
        written,
        _text(prepared.method, said),
        reference=prepared.origins[0],
        room=Room(said.memory, Path(prepared.work) / "gate" if said.memory else None, said.device),
        tell=tell,
        stop=stop,
    )
    found["held_out"] = bool(gate.text)
    check(found, gate, options.out)
    return found
