"""moetool: turn dense checkpoints into mixtures of experts, make those smaller, and measure what
it did to them.

The command line's verbs as functions; nothing heavy is imported until one is called. Errors are
`moetool.MoetoolError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetool.errors import MoetoolError, Stopped, UsageError, VerificationFailed

__all__ = [
    "MoetoolError",
    "Stopped",
    "UsageError",
    "VerificationFailed",
    "convert_layout",
    "eval",
    "inspect",
    "merge",
    "plan",
    "profile",
    "prune",
    "run",
    "upcycle",
    "verify",
]
__version__ = "0.2.0"

_COMMON = (
    "seed",
    "jobs",
    "memory",
    "max_shard",
    "overwrite",
    "strict",
    "device",
    "engine",
    "ray_address",
)


def upcycle(
    source: str,
    out: str,
    *,
    experts_from: Sequence[str] = (),
    dry_run: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Dense -> mixture of experts; `options` are those of `moetool methods show upcycle` and seed,
    jobs, memory, max_shard, overwrite, strict, device, engine, ray_address. Returns the report
    (with `dry_run` the plan's summary). Raises MoetoolError.
    """
    return _write("upcycle", (source, *experts_from), out, dry_run, options)


def convert_layout(
    source: str, out: str, *, dry_run: bool = False, **options: Any
) -> dict[str, Any]:
    """Per-expert <-> stacked expert tensors (`to="per-expert"` or `"fused"`). Returns the report.
    Raises MoetoolError.
    """
    return _write("convert-layout", (source,), out, dry_run, options)


def prune(source: str, out: str, *, dry_run: bool = False, **options: Any) -> dict[str, Any]:
    """A mixture of experts with fewer experts; `options` are those of `moetool methods show prune`
    (calibrate and text as a list or joined by commas) and the common ones. Returns the report.
    Raises MoetoolError; VerificationFailed when a gate is missed.
    """
    return _write("prune", (source,), out, dry_run, options)


def merge(source: str, out: str, *, dry_run: bool = False, **options: Any) -> dict[str, Any]:
    """A mixture of experts with clusters of experts merged; `options` are those of `moetool
    methods show merge`, as for `prune`.
    """
    return _write("merge", (source,), out, dry_run, options)


def profile(moe: str, stats: str, **options: Any) -> dict[str, Any]:
    """Statistics of every expert on text, into the folder `stats` (options: see
    moetool.measure.profile). Raises MoetoolError.
    """
    from moetool import measure

    return measure.profile(moe, stats, **options)


def eval(model: str, **options: Any) -> dict[str, Any]:
    """Perplexity on text, and distance from a reference (options: see moetool.measure.evaluate).
    Raises MoetoolError.
    """
    from moetool import measure

    return measure.evaluate(model, **options)


def plan(source: str, out: str, *, experts_from: Sequence[str] = (), **options: Any) -> Any:
    """The plan of an upcycle as a value (moetool.surgery.plan.Plan), made from headers alone.
    Raises MoetoolError.
    """
    return _prepare("upcycle", (source, *experts_from), out, options).plan


def run(recipe: str, *, dry_run: bool = False, **changes: Any) -> dict[str, Any]:
    """Run a recipe file; `changes` are what `--set` takes (source=, out=, from_=[...], any
    option). Raises MoetoolError.
    """
    from moetool.recipe import read

    text = {
        k.rstrip("_"): ",".join(v) if isinstance(v, list | tuple) else v
        for k, v in changes.items()
        if k not in _COMMON
    }
    found = read(recipe, [f"{k}={v}" for k, v in text.items()])
    common = {k: v for k, v in changes.items() if k in _COMMON} | {
        "seed": changes.get("seed", found["seed"])
    }
    return _write(
        found["method"],
        (found["source"], *found["from"]),
        found["out"],
        dry_run,
        found["options"] | common,
    )


def inspect(path: str) -> dict[str, Any]:
    """What a checkpoint is, from headers and config alone. Raises MoetoolError."""
    from moetool.report.anatomy import anatomy
    from moetool.surgery import source
    from moetool.surgery.checkpoint import Checkpoint

    return anatomy(Checkpoint.open(source.locate(path)))


def verify(
    out: str, *, against: Sequence[str] = (), load: bool | None = None, **options: Any
) -> dict[str, Any]:
    """Check an output, with `against` its sources byte by byte and function by function. Raises
    VerificationFailed.
    """
    from moetool.evaluate.verify import verify as check

    return check(out, against=against, load=load, **options)


def _prepare(
    method: str, sources: tuple[str, ...], out: str, options: dict[str, Any], dry_run: bool = True
) -> Any:
    from moetool import pipeline

    common = {k: v for k, v in options.items() if k in _COMMON}
    chosen = {k: v for k, v in options.items() if k not in _COMMON}
    return pipeline.prepare(
        pipeline.Options(
            out=out,
            sources=sources,
            method=method,
            method_options=chosen,
            dry_run=dry_run,
            **common,
        )
    )


def _write(
    method: str, sources: tuple[str, ...], out: str, dry_run: bool, options: dict[str, Any]
) -> dict[str, Any]:
    from moetool import pipeline

    prepared = _prepare(method, sources, out, options, dry_run)
    return prepared.summary() if dry_run else pipeline.make(prepared)
