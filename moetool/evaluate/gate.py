"""Gates for CI: is a smaller model still near enough to its source? Measured before anything is
there to load.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from moetool.errors import UsageError, VerificationFailed
from moetool.evaluate.perplexity import evaluate
from moetool.forward.batches import Cut
from moetool.forward.profile import Calibration
from moetool.progress import Progress
from moetool.surgery.checkpoint import Checkpoint


def check(found: dict[str, Any], *, max_kl: float, max_increase: float | None, where: str) -> None:
    """Raise VerificationFailed (exit code 4) when a measured value is above its gate."""
    for name, value, limit, shown in (
        ("KL divergence", found.get("kl"), max_kl or None, "{:.4g}"),
        ("perplexity increase", found.get("perplexity_increase"), max_increase, "{:.2%}"),
    ):
        if limit is not None and value is not None and not value <= limit:
            raise VerificationFailed(
                f"the {name} from the source is too large",
                file=where,
                expected=f"at most {shown.format(limit)}",
                found=shown.format(value),
                hint="remove less (--ratio), try --refit or another method, or raise the gate",
            )


def measure(
    source: Checkpoint,
    written: Checkpoint,
    method: Any,
    options: Any,
    *,
    tell: Progress,
    stop: threading.Event | None,
) -> dict[str, Any]:
    """Evaluate finished shards against their source on --text (or the calibration text) and hold
    them against the gates; {"quality": ...}.
    """
    files = method.text or method.calibrate
    if not files:
        raise UsageError(
            "a gate needs text to measure on",
            expected="--text FILE or --calibrate FILE",
            hint="give held-out text: --text test.jsonl",
        )
    text = Calibration(
        files,
        Cut(method.text_tokens, method.seq_len, True, False, options.seed, method.batch_tokens),
        method.text_field,
    )
    folder = (
        Path(options.out).absolute().parent
        / f".{Path(options.out).absolute().name}.moetool-work"
        / "gate"
    )
    found = evaluate(
        written,
        text,
        reference=source,
        memory=options.memory,
        folder=folder if options.memory else None,
        device=options.device,
        tell=tell,
        stop=stop,
    )
    found["held_out"] = bool(method.text)
    check(
        found,
        max_kl=method.max_kl,
        max_increase=method.max_perplexity_increase,
        where=options.out,
    )
    return {"quality": found}
