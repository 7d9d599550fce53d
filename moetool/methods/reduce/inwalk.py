"""The one place where deciding and the walk meet: each layer is decided, rebuilt and solved on
what the changed layers below give it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetool import atomic
from moetool.forward import profile as profiling
from moetool.forward.batches import Batches
from moetool.forward.block import Block
from moetool.forward.stats import LayerStats, Profiler, Wanted
from moetool.forward.walk import Budget, Walk
from moetool.kernels import codec, form, solve
from moetool.methods.reduce.cut import solved_name
from moetool.methods.reduce.decide import parts_source, tokens_per_expert
from moetool.methods.reduce.decision import Decided, Layer
from moetool.methods.reduce.view import View
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moetool.methods.reduce.decide import Job


def walk(
    job: Job, guarded: dict[int, list[int]], counts: dict[int, int], replay: dict[int, Layer]
) -> tuple[dict[int, Layer], tuple[Checkpoint, ...], int]:
    """Returns (decisions, solved tensors as a source, promised peak). Layers that an earlier run
    finished are taken from the work folder.
    """
    options, mixture, settings = job.options, job.mixture, job.settings
    batches = options.calibration(settings.seed).read(job.source)
    sample = min(
        batches.total,
        max(options.sample if job.sample else 0, options.refit_tokens if options.refit else 0),
    )
    wanted = Wanted(1, sample, job.dense, job.covariance)
    folder = job.work / "walk"
    seal = profiling.digest(
        job.source,
        batches,
        wanted,
        json.dumps(
            [
                job.verb,
                job.method,
                asdict(options),
                {str(n): layer.as_json() for n, layer in replay.items()},
                guarded,
            ],
            sort_keys=True,
        ),
    )
    profiling.claim(folder, seal)
    profiler = Profiler(wanted)
    done = {
        int(p.stem.partition("-")[2]): json.loads(p.read_text())
        for p in folder.glob("decision-*.json")
    }
    layers = {
        n: Decided.from_json(
            {"schema": 1, "experts": mixture.experts, "layers": {str(n): found["layer"]}}
        ).layers[n]
        for n, found in done.items()
    }
    for n, found in sorted(done.items()):
        job.facts.setdefault("tokens_per_expert", {})[str(n)] = found["tokens"]
        if found["refit"]:
            job.facts.setdefault("refit", {})[str(n)] = found["refit"]
    _note(job, batches)
    if (
        folder / "done.json"
    ).exists():  # killed while the output was written: nothing is solved anew
        return (
            layers,
            solved_source(folder) if options.refit else (),
            int(json.loads((folder / "done.json").read_text())["peak"]),
        )

    def change(number: int, block: Block) -> Block:
        stats = profiler.layers.pop(number)
        view = View(
            mixture,
            number,
            options,
            settings.seed,
            stats,
            tuple(guarded.get(number, ())),
            settings.device,
            lambda: block,
        )
        layer = replay.get(number) or job.choose(view, counts[number])
        layers[number] = layer
        job.facts.setdefault("tokens_per_expert", {})[str(number)] = tokens_per_expert(stats)
        new = refit_layer(job, view, layer, block, _sample(stats), folder)
        atomic.write(
            folder / f"decision-{number:05d}.json",
            json.dumps(
                {
                    "layer": layer.as_json(),
                    "refit": job.facts.get("refit", {}).get(str(number)),
                    "tokens": tokens_per_expert(stats),
                }
            ),
        )
        return new

    hidden, width = (
        int(mixture.layout.field("hidden", mixture.text_model.config)),
        profiling._width(mixture),
    )
    beside = (
        4 * mixture.experts * mixture.expert_elements(mixture.layers[0])
    )  # the changed block beside the old one
    extra = (
        wanted.memory(mixture.experts, hidden, width)
        + beside
        + job.buffers
        + (
            6 * 4 * sample * hidden
            + 16 * mixture.experts * width * width // max(1, mixture.experts // 4)
            if options.refit
            else 0
        )
    )
    walking = Walk(
        job.source,
        batches,
        Budget(settings.memory, folder, settings.device),
        extra=extra,
        tell=settings.tell,
        stop=settings.stop,
        name="propagate",
    )
    walking.run(profiler, change)
    atomic.write(folder / "done.json", json.dumps({"peak": walking.peak}))
    walking.hidden.clear()
    return layers, solved_source(folder) if options.refit else (), walking.peak


def _note(job: Job, batches: Batches) -> None:
    """What the report says of the text."""
    job.warnings += [n for n in batches.notes if n not in job.warnings]
    job.facts["data"] = {
        "tokens": batches.total,
        "files": [
            {"name": n, "tokens": t} for n, t in zip(batches.files, batches.tokens, strict=True)
        ],
        "data_sha256": batches.digest,
        "seq_len": batches.seq_len,
    }


def _sample(stats: LayerStats) -> Any:
    return torch.from_numpy(stats.x) if stats.has("x") else None


def refit_layer(job: Job, view: View, layer: Layer, block: Block, x: Any, folder: Path) -> Block:
    """The layer's new block. With --refit its down matrices are solved on x, written to `folder`
    as the output will hold them, and the block continues with exactly those (rounded) values.
    """
    if job.rebuild is None:
        return block.with_experts(layer.leads)
    new, _ = job.rebuild(view, layer, block, view.layer)
    if not job.options.refit:
        return new
    x = x.to(block.router.device)
    target = block.routed(x, block.route(x))
    down, before, after = solve.refit(x, new.route(x), new.experts, new.law, target)
    job.facts.setdefault("refit", {})[str(view.layer)] = {
        "error_before": float(f"{before:.4g}"),
        "error_after": float(f"{after:.4g}"),
    }
    stored = _as_stored(job, view.layer, down)
    _save(
        folder / f"solved-{view.layer:05d}.safetensors",
        {solved_name(view.layer, j, "down"): t for j, t in enumerate(stored)},
    )
    lie = job.mixture.orientation(view.layer)
    rounded = torch.stack(
        [(t.T if lie["transposed"] else t).to(new.experts.down.dtype) for t in stored]
    )
    return replace(new, experts=replace(new.experts, down=rounded))


def _as_stored(job: Job, layer: int, down: Any) -> list[Any]:
    """Solved matrices as the file will hold them: dtype and orientation of the original."""
    dtype = job.source.tensor(job.mixture.pieces(layer, 0)["down"].name).dtype
    lie = job.mixture.orientation(layer)
    return [
        form.stored({"down": d}, ["down"], transposed=lie["transposed"])[0]
        .to(codec.torch_dtype(dtype))
        .contiguous()
        .cpu()
        for d in down
    ]


def _save(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.writing(path, keep_same=True) as temporary:
        save_file(tensors, temporary)


def solved_source(folder: Path) -> tuple[Checkpoint, ...]:
    """What was solved, as a source of the plan."""
    return (parts_source(folder, "solved-*.safetensors"),)
