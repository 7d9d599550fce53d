"""ASSEMBLE: which checkpoint gives each expert, and what becomes of the trunks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Certificate
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout
from moetool.surgery.spec import FLOATS, Piece
from moetool.surgery.text_model import text_model
from moetool.units import STRENGTH

# Fields in which fine-tunes of one base may differ without changing what their tensors mean.
_FREE = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "architectures",
    "attention_dropout",
    "initializer_range",
    "pretraining_tp",
    "hidden_dropout",
    "output_router_logits",
    "unsloth_version",
}
# Said first when several differ.
_FIRST = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
SAMPLE = 8_192  # values a tensor, for the trunk report


def expert_map(spec: str, experts: int, split: int, sources: int) -> tuple[int, ...]:
    """Source number of each expert. Default: the --from models in turn, with SRC first when one
    more is needed.

    With split G, each group of G consecutive experts comes from one source; the last group may be
    cut short. UsageError when the numbers do not fit.
    """
    groups = -(-experts // split)
    if spec:
        chosen = [int(n) for n in spec.split(",")] if re.fullmatch(r"\d+(,\d+)*", spec) else []
        if len(chosen) not in (groups, experts) or any(c >= sources for c in chosen):
            raise UsageError(
                f"--expert-map {spec!r} does not fit",
                expected=f"{groups} numbers below {sources} (0 is SRC)",
                hint="for example --expert-map 0,1,1,2",
            )
        return tuple(chosen) if len(chosen) == experts else _each(chosen, split)[:experts]
    if sources == 1:
        return (0,) * experts
    given = sources - 1
    pool = list(range(1, sources)) if groups % given == 0 else list(range(sources))
    if groups % len(pool):
        raise UsageError(
            f"{groups} experts cannot come evenly from {given} --from models",
            expected=f"a multiple of {given}, or of {given + 1} with SRC as one of them",
            hint="change --experts, or say --expert-map",
        )
    return _each([pool[g * len(pool) // groups] for g in range(groups)], split)[:experts]


def _each(values: Sequence[int], times: int) -> tuple[int, ...]:
    """Every value so many times, one after another."""
    return tuple(values[i // times] for i in range(len(values) * times))


def trunk_weights(spec: str, sources: int) -> list[float] | None:
    """Weights of the sources' trunks, or None for the base's own bytes. base | mean |
    weights:a,b,... | interp:x.
    """
    if spec == "base":
        return None
    if spec == "mean":
        return [1.0 / sources] * sources
    if found := re.fullmatch(r"interp:(\d*\.?\d+)", spec):
        x = float(found[1])
        if sources != 2 or not 0 <= x <= 1:
            raise UsageError(
                f"--trunk {spec} needs SRC, one --from and a share between 0 and 1",
                found=f"{sources} models",
                hint="use weights:... for more models",
            )
        return [1.0 - x, x]
    if found := re.fullmatch(r"weights:(-?\d*\.?\d+(?:,-?\d*\.?\d+)*)", spec):
        weights = [float(w) for w in found[1].split(",")]
        if max(map(abs, weights)) > STRENGTH:
            raise UsageError(
                f"--trunk {spec[:60]} has a weight that is too large",
                expected=f"at most {STRENGTH:g}",
                hint="give weights whose sum is near 1",
            )
        if len(weights) != sources:
            raise UsageError(
                f"--trunk {spec} has {len(weights)} weights",
                expected=f"{sources} (SRC first)",
                hint="give one weight a model",
            )
        return weights
    raise UsageError(
        f"--trunk {spec!r} is not understood",
        expected="base, mean, weights:a,b,... or interp:x",
        hint="for example --trunk mean",
    )


def check_trunk(spec: str, sources: int) -> None:
    """Refuse a mix of the trunks of one model; UsageError."""
    if sources == 1 and spec != "base":
        raise UsageError(
            "--trunk does nothing without --from",
            expected="--from MODEL",
            found=f"--trunk {spec[:40]} alone",
            hint="give the models whose trunks are meant, or leave out --trunk",
        )


def mixed() -> Certificate:
    """Of what is made of several models."""
    why = "experts or trunk come from different models: there is no single function to keep"
    return Certificate("none", why, None)


def check_alike(sources: Sequence[Checkpoint]) -> None:
    """All sources must be one architecture with the same tensors; MoetoolError names the first
    difference.
    """
    base = sources[0]
    for other in sources[1:]:
        _compare_configs(base, other, base.config, other.config, "")
        tied = _tied(base)
        for name in sorted((set(base.tensors) ^ set(other.tensors)) - tied):
            missing, holder = (other, base) if name in base.tensors else (base, other)
            raise MoetoolError(
                "one source has a tensor that another lacks",
                file=missing.folder,
                tensor=name,
                expected=f"as in {holder.folder}",
                found="absent",
                hint="all sources must be fine-tunes of one model",
            )
        for name in sorted(set(base.tensors) & set(other.tensors)):
            a, b = base.tensors[name], other.tensors[name]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise MoetoolError(
                    "sources disagree about a tensor",
                    file=other.folder,
                    tensor=name,
                    expected=f"{a.dtype} {list(a.shape)} as in {base.folder}",
                    found=f"{b.dtype} {list(b.shape)}",
                    hint="all sources must be fine-tunes of one model, in one dtype",
                )


def _tied(base: Checkpoint) -> set[str]:
    """Names of tensors that a checkpoint may hold or leave to another that they share memory with."""
    family, at = Layout.load(str(base.config.get("model_type"))), text_model(base.config)
    return set(family.tied) | {at.name(name) for name in at.layout.tied}


def _compare_configs(
    base: Checkpoint, other: Checkpoint, a: JsonObject, b: JsonObject, path: str
) -> None:
    for key in sorted((set(a) & set(b)) - _FREE, key=lambda k: (k not in _FIRST, k)):
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            _compare_configs(base, other, a[key], b[key], f"{path}{key}.")
        elif a[key] != b[key] and isinstance(a[key], int | float | str | bool | list):
            raise MoetoolError(
                "sources are not the same architecture",
                file=f"{other.folder}/config.json",
                expected=f"{path}{key}={a[key]!r} as in {base.folder}",
                found=f"{b[key]!r}",
                hint="all sources must be fine-tunes of one model",
            )


def trunk_report(sources: Sequence[Checkpoint], names: Sequence[str]) -> list[JsonObject]:
    """How far each source's trunk is from the base's: relative L2 distance, from evenly spaced
    samples of every tensor.
    """
    import numpy as np

    base, rows = sources[0], []
    for other in sources[1:]:
        moved = total = 0.0
        worst = (0.0, "")
        for name in names:
            stored = base.tensors[name]
            if stored.dtype not in FLOATS or name not in other.tensors:
                continue
            far = near = 0.0
            for piece in _samples(name, stored.elements):
                x, y = base.numbers(piece), other.numbers(piece)
                near += float(np.dot(x, x))
                if not np.array_equal(x, y, equal_nan=True):
                    far += float(np.dot(y - x, y - x))
            moved, total = moved + far, total + near
            if near and (far / near) ** 0.5 > worst[0]:
                worst = ((far / near) ** 0.5, name)
        rows.append(
            {
                "source": other.folder,
                "distance": (moved / total) ** 0.5 if total else 0.0,
                "furthest": worst[1],
                "furthest_distance": worst[0],
            }
        )
    return rows


def _samples(name: str, count: int) -> list[Piece]:
    if count <= SAMPLE:
        return [Piece(name, (count,))]
    run, pieces = 2048, SAMPLE // 2048
    return [Piece(name, (run,), i * (count - run) // (pieces - 1)) for i in range(pieces)]
