"""`moetool upcycle` and `moetool convert-layout`: the commands that write."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moetool.cli.main import app, session
from moetool.units import parse_bytes, show_bytes, show_count, show_seconds

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="a folder, a .safetensors file, or a Hub id org/name[@revision]"
    ),
]
Out = Annotated[
    str, typer.Argument(metavar="OUT", help="folder to write; must not exist, or be empty")
]
Seed = Annotated[int, typer.Option(help="everything random derives from it")]
Jobs = Annotated[int, typer.Option(help="workers; 0: as many as cores and --memory allow", min=0)]
Memory = Annotated[
    str, typer.Option(help="promise: refuse, or use fewer workers, rather than need more (2GB)")
]
MaxShard = Annotated[str, typer.Option(help="largest output file")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="replace OUT, and an unfinished other output in its place"),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="refuse sources with NaN or inf instead of warning")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be written, and write nothing")
]
Device = Annotated[str, typer.Option(help="where tensors are computed: cpu, cuda, cuda:1")]
Engine = Annotated[str, typer.Option(help="local threads, or ray")]
RayAddress = Annotated[str, typer.Option(help="Ray cluster; empty starts one here")]


@app.command()
def upcycle(
    src: Src,
    out: Out,
    experts: Annotated[int, typer.Option(help="routed experts in each MoE layer")] = 8,
    top_k: Annotated[int, typer.Option(help="experts that run for a token")] = 2,
    split: Annotated[
        int, typer.Option(help="cut each FFN into this many parts; experts = parts x replicas")
    ] = 1,
    from_: Annotated[
        list[str],
        typer.Option("--from", metavar="MODEL", help="a fine-tune that gives experts; repeat it"),
    ] = [],  # noqa: B006
    expert_map: Annotated[
        str, typer.Option(help="source of each expert: 0 is SRC, 1 the first --from (0,1,1,2)")
    ] = "",
    trunk: Annotated[
        str,
        typer.Option(help="with --from, all but the FFNs: base, mean, weights:a,b,..., interp:x"),
    ] = "base",
    layers: Annotated[
        str,
        typer.Option(
            help="all, none, every:N[+OFFSET], first-half, second-half, last:N, or 0,2,5-7"
        ),
    ] = "all",
    shared: Annotated[
        bool,
        typer.Option(
            "--shared",
            help="keep the FFN as an always-on shared expert; routed experts start at zero output",
        ),
    ] = False,
    router: Annotated[
        str, typer.Option(help="auto, zero, normal:SIGMA, kaiming, uniform:SIGMA, group:SIGMA")
    ] = "auto",
    carve: Annotated[
        str,
        typer.Option(
            help="how --split chooses neurons: contiguous, random, kmeans:gate, kmeans:up"
        ),
    ] = "contiguous",
    diversify: Annotated[
        str, typer.Option(help="none, permute, noise:SIGMA, drop:RATIO[:reference], joined by +")
    ] = "none",
    scale: Annotated[
        str, typer.Option(help="factor on expert outputs; auto solves the coverage identity")
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="model type to write; auto takes the first that loses nothing")
    ] = "auto",
    layout: Annotated[str, typer.Option(help="expert tensors: auto, per-expert or fused")] = "auto",
    seed: Seed = 0,
    jobs: Jobs = 0,
    memory: Memory = "",
    max_shard_size: MaxShard = "5GB",
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    device: Device = "cpu",
    engine: Engine = "local",
    ray_address: RayAddress = "",
) -> int:
    """Turn a dense checkpoint, or several fine-tunes of one, into a mixture of experts.

    The default keeps the function exactly: 8 copies of each FFN, 2 run for a token, their weights
    sum to one.
    """
    chosen = {
        "experts": experts,
        "top_k": top_k,
        "split": split,
        "expert_map": expert_map,
        "trunk": trunk,
        "layers": layers,
        "shared": shared,
        "router": router,
        "carve": carve,
        "diversify": diversify,
        "scale": scale,
        "target": target,
        "layout": layout,
    }
    return write(
        "upcycle",
        (src, *from_),
        out,
        chosen,
        common(seed, jobs, memory, max_shard_size, overwrite, strict, device, engine, ray_address),
        dry_run=dry_run,
    )


@app.command(name="convert-layout")
def convert_layout(
    src: Src,
    out: Out,
    to: Annotated[str, typer.Option(help="per-expert or fused")] = "per-expert",
    jobs: Jobs = 0,
    memory: Memory = "",
    max_shard_size: MaxShard = "5GB",
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    engine: Engine = "local",
    ray_address: RayAddress = "",
) -> int:
    """Write the same MoE with its experts as single tensors, or stacked; only bytes move."""
    return write(
        "convert-layout",
        (src,),
        out,
        {"to": to},
        common(0, jobs, memory, max_shard_size, overwrite, strict, "cpu", engine, ray_address),
        dry_run=dry_run,
    )


def common(
    seed: int,
    jobs: int,
    memory: str,
    max_shard_size: str,
    overwrite: bool,
    strict: bool,
    device: str,
    engine: str,
    ray_address: str,
) -> dict[str, Any]:
    """The options of every writing command, as run.Options wants them."""
    return {
        "seed": seed,
        "jobs": jobs,
        "memory": parse_bytes(memory) if memory else None,
        "max_shard": parse_bytes(max_shard_size),
        "overwrite": overwrite,
        "strict": strict,
        "device": device,
        "engine": engine,
        "ray_address": ray_address or None,
    }


def write(
    method: str,
    sources: tuple[str, ...],
    out: str,
    chosen: dict[str, Any],
    rest: dict[str, Any],
    *,
    dry_run: bool,
) -> int:
    """Prepare, show or make, report."""
    from moetool import pipeline

    sink, walks = session.sink, method in ("prune", "merge")
    session.working = walks  # a walk ends after its layer; all other looking is short
    options = pipeline.Options(
        out=out,
        sources=sources,
        method=method,
        method_options=chosen,
        command=session.command,
        dry_run=dry_run,
        **rest,
    )
    prepared = pipeline.prepare(options, progress=sink.steps, stop=session.stop)
    if dry_run:
        summary = prepared.summary()
        for line in prepared.made.warnings:
            sink.say(f"warning: {line}")
        sink.result(
            summary | {"dry_run": True}, _described(summary) + "\nnothing was written (--dry-run)"
        )
        return 0
    session.working = True
    report = pipeline.make(
        prepared, progress=sink.progress if not walks else sink.either, stop=session.stop
    )
    session.working, session.finished = False, True
    for line in report["warnings"]:
        sink.say(f"warning: {line}")
    sink.result(report, _described(report))
    return 0


def _described(summary: dict[str, Any]) -> str:
    """For people, as the verb wants it."""
    if "reduction" in summary:
        from moetool.cli import compress

        return compress.describe(summary)
    return describe(summary)


def describe(summary: dict[str, Any]) -> str:
    """The summary of a plan or a finished run, for people."""
    certificate = summary["certificate"]
    lines = [f"{' + '.join(summary['sources'])} -> {summary['out']}"]
    if "target_type" in summary:
        width = summary.get("expert_width")
        lines.append(
            f"  family       {summary['source_type']} -> {summary['target_type']} ({summary['layout']} tensors)"
        )
        if summary["experts"]:
            lines.append(
                f"  experts      {summary['experts']} of width {width}, top-{summary['top_k']}, in {len(summary['layers'])} layers"
            )
        lines.append(
            f"  parameters   {show_count(summary['parameters'])}, {show_count(summary['active_parameters'])} active"
        )
    lines.append(
        f"  output       {show_bytes(summary['output_bytes'])} in {summary['shards']} file{'s' * (summary['shards'] != 1)}, {summary['tensors']} tensors ({show_bytes(summary['free_disk'])} free)"
    )
    lines.append(
        f"  memory       at most {show_bytes(summary['peak_memory'])}, {summary['jobs']} worker{'s' * (summary['jobs'] != 1)}"
    )
    coverage = (
        f", coverage {certificate['coverage']:g}" if certificate["coverage"] is not None else ""
    )
    lines.append(f"  certificate  {certificate['level']}{coverage}: {certificate['why']}")
    if certificate["place"] != "none":
        lines.append(f"  scale        {certificate['scale']:g} on {certificate['place']}")
    for row in summary.get("trunks", ()):
        lines.append(
            f"  trunk        {row['source']} is {row['distance']:.3%} from the base (furthest: {row['furthest']} {row['furthest_distance']:.3%})"
        )
    dropped = {
        **summary["dropped_tensors"],
        **{
            f"config.{k}": v
            for k, v in summary["dropped_fields"].items()
            if k.rpartition(".")[2] not in ("architectures", "model_type")
        },
    }
    lines += [f"  left out     {name}: {why}" for name, why in list(dropped.items())[:12]]
    if "seconds" in summary:
        rate = summary["output_bytes"] / max(summary["seconds"], 1e-9)
        resumed = (
            f", {summary['resumed_shards']} files were there already"
            if summary["resumed_shards"]
            else ""
        )
        lines.append(
            f"  done         {show_seconds(summary['seconds'])}, {show_bytes(rate)}/s{resumed}"
        )
    return "\n".join(lines)
