"""`profile` and `eval` as functions: look at a model with text, write no model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetool.errors import UsageError
from moetool.progress import Progress, silent
from moetool.units import parse_share


def profile(
    moe: str,
    stats: str,
    *,
    calibrate: Sequence[str],
    tokens: int = 262_144,
    seq_len: int = 2048,
    pack: bool = True,
    text_field: str = "",
    batch_tokens: int = 4096,
    sample: int = 2048,
    covariance: bool = False,
    seed: int = 0,
    memory: int | None = None,
    device: str = "cpu",
    tell: Progress = silent,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Statistics of every expert on text, into the folder `stats`. Returns profile.json with a
    summary of each layer. Raises MoetoolError.
    """
    from moetool.forward import profile as profiling
    from moetool.forward.batches import Cut
    from moetool.forward.stats import Wanted
    from moetool.surgery import source
    from moetool.surgery.checkpoint import Checkpoint

    _positive(tokens=tokens, batch_tokens=batch_tokens, seq_len=seq_len - 1, sample=sample + 1)
    checkpoint = Checkpoint.open(source.locate(moe))
    calibration = profiling.Calibration(
        tuple(calibrate), Cut(tokens, seq_len, pack, True, seed, batch_tokens), text_field
    )
    made = profiling.make(
        checkpoint,
        moe,
        Path(stats),
        calibration,
        Wanted(1, sample, sample > 0, covariance),
        memory=memory,
        device=device,
        tell=tell,
        stop=stop,
    )
    return made.facts | _summary(made, checkpoint)


def _summary(made: Any, checkpoint: Any) -> dict[str, Any]:
    """A line a layer, super experts, and how the files differ."""
    from moetool.forward import profile as profiling
    from moetool.methods.reduce import protect
    from moetool.surgery.experts import Mixture

    mixture = Mixture.of(checkpoint)
    rows, largest = [], {}
    for number in made.facts["layers"]:
        stats = made.layer(number)
        used = stats.total("count")[: mixture.experts] / max(1, stats.tokens)
        reap, largest[number] = stats.mean("reap"), stats.max_out
        cosine = (
            stats.cosine[~_diagonal(mixture.experts)].mean()
            if stats.has("cosine") and mixture.experts > 1
            else None
        )
        rows.append(
            {
                "layer": number,
                "least_used": float(used.min()),
                "most_used": float(used.max()),
                "idle": int((used == 0).sum()),
                "max_out": float(stats.max_out.max()),
                "cosine": None if cosine is None else float(cosine),
                "reap_least": float(reap.min()),
                "reap_most": float(reap.max()),
            }
        )
    layers = int(mixture.layout.field("layers", mixture.text_model.config))
    return {
        "summary": rows,
        "super_experts": {str(n): e for n, e in protect.super_experts(largest, layers).items()},
        "domains": profiling.domains(made, [f["name"] for f in made.facts["files"]]),
    }


def _diagonal(count: int) -> Any:
    import numpy as np

    return np.eye(count, dtype=bool)


def evaluate(
    model: str,
    *,
    text: Sequence[str],
    reference: str = "",
    tokens: int = 131_072,
    seq_len: int = 2048,
    pack: bool = True,
    text_field: str = "",
    batch_tokens: int = 4096,
    max_kl: float = 0.0,
    max_perplexity_increase: str = "",
    memory: int | None = None,
    device: str = "cpu",
    tell: Progress = silent,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Perplexity of a model on text; with a reference KL, top-1 agreement and flips. Raises
    VerificationFailed when a gate is missed.
    """
    import tempfile

    from moetool.evaluate import gate, perplexity
    from moetool.forward.batches import Cut
    from moetool.forward.profile import Calibration
    from moetool.surgery import source
    from moetool.surgery.checkpoint import Checkpoint

    _positive(tokens=tokens, batch_tokens=batch_tokens, seq_len=seq_len - 1)
    increase = parse_share(max_perplexity_increase) if max_perplexity_increase else None
    if (max_kl or increase is not None) and not reference:
        raise UsageError(
            "a gate compares with the original",
            expected="--reference ORIGINAL",
            hint="give what the model was made from",
        )
    opened = [
        Checkpoint.open(source.locate(name))
        for name in ([model, reference] if reference else [model])
    ]
    calibration = Calibration(
        tuple(text), Cut(tokens, seq_len, pack, False, 0, batch_tokens), text_field
    )
    with tempfile.TemporaryDirectory(
        prefix="moetool-", dir=None if memory is None else "."
    ) as folder:
        found = perplexity.evaluate(
            opened[0],
            calibration,
            reference=opened[1] if reference else None,
            memory=memory,
            folder=Path(folder) if memory else None,
            device=device,
            tell=tell,
            stop=stop,
        )
    found = {"model": model, "reference": reference or None, **found}
    gate.check(found, max_kl=max_kl, max_increase=increase, where=model)
    return found


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} is too small", found=value, hint="leave it out"
            )
