"""`moetool prune` and `moetool merge`: the commands that give a model fewer experts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moetool.cli.main import app
from moetool.cli.upcycle import (
    Device,
    DryRun,
    Engine,
    Jobs,
    MaxShard,
    Memory,
    Out,
    Overwrite,
    RayAddress,
    Seed,
    Src,
    Strict,
    common,
    write,
)
from moetool.units import show_bytes, show_count, show_seconds

Ratio = Annotated[float, typer.Option(help="share of the experts removed: 0.25 turns 128 into 96")]
Calibrate = Annotated[
    list[str],
    typer.Option(
        "--calibrate",
        metavar="FILE[:SHARE]",
        help="text to calibrate on: .txt, .jsonl, .parquet, a Hub dataset, or - for standard input; repeat it",
    ),
]
Stats = Annotated[
    str, typer.Option(help="a profile made by `moetool profile`, instead of --calibrate")
]
Tokens = Annotated[int, typer.Option(help="tokens of calibration text")]
SeqLen = Annotated[int, typer.Option(help="tokens of a sequence")]
Pack = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="join documents and cut them into whole sequences, or one sequence a document",
    ),
]
TextField = Annotated[str, typer.Option(help="field of .jsonl and .parquet that holds the text")]
BatchTokens = Annotated[int, typer.Option(help="tokens that go through a layer at once")]
Sample = Annotated[
    int, typer.Option(help="tokens of a layer kept for methods that run all experts")
]
DecisionsFile = Annotated[
    str,
    typer.Option(
        "--decisions",
        metavar="FILE",
        help="replay decisions from FILE; with --dry-run, write them there if it does not exist",
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="experts kept: uniform, or sensitivity (the same total, more where they are needed)"
    ),
]
Counts = Annotated[
    str, typer.Option(help="for other numbers in each layer: zeroed, ghost or ragged")
]
OldCounts = Annotated[str, typer.Option("--layout", hidden=True)]
Protect = Annotated[
    bool, typer.Option("--protect/--no-protect", help="keep super experts whatever their score")
]
Propagate = Annotated[
    bool,
    typer.Option("--propagate", help="look at each layer with the layers below it already changed"),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="solve down_proj of the kept experts again, so that each layer's output stays as near as it can",
    ),
]
RefitTokens = Annotated[int, typer.Option(help="tokens of a layer that --refit solves on")]
MaxKl = Annotated[
    float,
    typer.Option(
        help="gate: exit code 4, and nothing that loads, when the KL divergence from SRC is larger (0: none)"
    ),
]
MaxIncrease = Annotated[str, typer.Option(help="the same for perplexity, for example 2%")]
Text = Annotated[
    list[str],
    typer.Option(
        "--text", metavar="FILE", help="held-out text for the gate and the report; repeat it"
    ),
]
TextTokens = Annotated[int, typer.Option(help="tokens of --text")]


@app.command()
def prune(
    src: Src,
    out: Out,
    ratio: Ratio = 0.25,
    method: Annotated[
        str,
        typer.Option(
            help="auto (reap with text, router-distance without), easy-ep, ean, frequency, gate-mass, mone, naee, random, reap, router-distance, stun"
        ),
    ] = "auto",
    calibrate: Calibrate = [],  # noqa: B006
    stats: Stats = "",
    tokens: Tokens = 262_144,
    seq_len: SeqLen = 2048,
    pack: Pack = True,
    text_field: TextField = "",
    batch_tokens: BatchTokens = 4096,
    sample: Sample = 2048,
    decisions: DecisionsFile = "",
    budget: Budget = "uniform",
    uneven: Counts = "uniform",
    layout: OldCounts = "",
    protect: Protect = True,
    propagate: Propagate = False,
    refit: Refit = False,
    refit_tokens: RefitTokens = 32_768,
    total_sparsity: Annotated[
        float,
        typer.Option(
            help="with --method stun: share of all expert weights that are gone or zero at the end"
        ),
    ] = 0.0,
    max_kl: MaxKl = 0.0,
    max_perplexity_increase: MaxIncrease = "",
    text: Text = [],  # noqa: B006
    text_tokens: TextTokens = 32_768,
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
    """Remove experts from a mixture of experts. Kept ones move byte for byte; with no text at all,
    router rows decide.

    Everything counted with the experts goes with them: router rows, selection biases, per-expert
    scales, id tables, MTP layers.
    """
    chosen = {
        "ratio": ratio,
        "method": method,
        "calibrate": ",".join(calibrate),
        "stats": stats,
        "tokens": tokens,
        "seq_len": seq_len,
        "pack": pack,
        "text_field": text_field,
        "batch_tokens": batch_tokens,
        "sample": sample,
        "decisions": decisions,
        "budget": budget,
        "layout" if layout else "uneven": layout or uneven,
        "protect": protect,
        "propagate": propagate,
        "refit": refit,
        "refit_tokens": refit_tokens,
        "total_sparsity": total_sparsity,
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "text": ",".join(text),
        "text_tokens": text_tokens,
    }
    return write(
        "prune",
        (src,),
        out,
        chosen,
        common(seed, jobs, memory, max_shard_size, overwrite, strict, device, engine, ray_address),
        dry_run=dry_run,
    )


@app.command()
def merge(
    src: Src,
    out: Out,
    ratio: Ratio = 0.25,
    method: Annotated[
        str,
        typer.Option(
            help="auto (mergemoe with text, alike without), alike, d2-moe, hc-smoe, m-smoe, mergemoe, ream, sub-moe, sub-moe-whitened"
        ),
    ] = "auto",
    calibrate: Calibrate = [],  # noqa: B006
    stats: Stats = "",
    tokens: Tokens = 262_144,
    seq_len: SeqLen = 2048,
    pack: Pack = True,
    text_field: TextField = "",
    batch_tokens: BatchTokens = 4096,
    features: Annotated[
        str,
        typer.Option(
            help="what experts are compared by: outputs, cosine, mean-outputs, router, router-logits, outputs-and-logits, weights"
        ),
    ] = "auto",
    cluster: Annotated[
        str, typer.Option(help="how: kmeans, average, complete, ward, dominant, ream")
    ] = "auto",
    joint: Annotated[str, typer.Option(help="layers clustered at once: 1 or 2")] = "auto",
    weigh: Annotated[
        str, typer.Option(help="what weighs a cluster's members: frequency, saliency, uniform")
    ] = "auto",
    align: Annotated[
        str, typer.Option(help="neurons matched before averaging: none, weights, activations")
    ] = "auto",
    combine: Annotated[
        str,
        typer.Option(
            help="mean, svd (truncated union SVD; untruncated it is the weighted mean), least-squares (mean, then --refit), ties, base-delta"
        ),
    ] = "auto",
    router: Annotated[
        str,
        typer.Option(
            help="a cluster's router row: centroid (its lead's), mean, logsumexp (where the bias is part of the logits)"
        ),
    ] = "auto",
    rank_energy: Annotated[
        float, typer.Option(help="share of the singular values' energy that svd keeps; 1 keeps all")
    ] = 0.95,
    whiten: Annotated[
        str, typer.Option(help="true or false: svd in the space of whitened inputs")
    ] = "auto",
    density: Annotated[float, typer.Option(help="share of differences that ties keeps")] = 0.2,
    form: Annotated[
        str, typer.Option(help="base-delta: materialised or factored")
    ] = "materialised",
    sample: Sample = 2048,
    decisions: DecisionsFile = "",
    budget: Budget = "uniform",
    uneven: Counts = "uniform",
    layout: OldCounts = "",
    protect: Protect = True,
    propagate: Propagate = False,
    refit: Refit = False,
    refit_tokens: RefitTokens = 32_768,
    max_kl: MaxKl = 0.0,
    max_perplexity_increase: MaxIncrease = "",
    text: Text = [],  # noqa: B006
    text_tokens: TextTokens = 32_768,
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
    """Merge experts of a mixture of experts into fewer. The checkpoint really gets smaller, and
    the report says what became of the router.

    The union SVD without truncation and whitening is the weighted mean under another name;
    --rank-energy and --whiten make it differ.
    """
    chosen = {
        "ratio": ratio,
        "method": method,
        "calibrate": ",".join(calibrate),
        "stats": stats,
        "tokens": tokens,
        "seq_len": seq_len,
        "pack": pack,
        "text_field": text_field,
        "batch_tokens": batch_tokens,
        "features": features,
        "cluster": cluster,
        "joint": joint,
        "weigh": weigh,
        "align": align,
        "combine": combine,
        "router": router,
        "rank_energy": rank_energy,
        "whiten": whiten,
        "density": density,
        "form": form,
        "sample": sample,
        "decisions": decisions,
        "budget": budget,
        "layout" if layout else "uneven": layout or uneven,
        "protect": protect,
        "propagate": propagate,
        "refit": refit,
        "refit_tokens": refit_tokens,
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "text": ",".join(text),
        "text_tokens": text_tokens,
    }
    return write(
        "merge",
        (src,),
        out,
        chosen,
        common(seed, jobs, memory, max_shard_size, overwrite, strict, device, engine, ray_address),
        dry_run=dry_run,
    )


def describe(summary: dict[str, Any]) -> str:
    """What prune or merge decided, or did, for people."""
    before, after = summary["experts_before"], summary["experts_after"]
    shown = after if isinstance(after, int) else f"{min(after)} to {max(after)}"
    lines = [f"{summary['sources'][0]} -> {summary['out']}"]
    lines.append(
        f"  {summary['reduction']:<12} {before} -> {shown} experts a layer ({100 * summary['removed_share']:.0f} % removed), {summary['method_used']}, {len(summary['layers'])} layers of {summary['source_type']}"
    )
    if summary.get("saved_share") is not None:
        ranks = ", ".join(f"{m} {r}" for m, r in summary["rank"].items())
        lines.append(
            f"  base + delta {summary['saved_share']:.0%} of expert weights saved, ranks {ranks}, {summary['form']}"
        )
    if summary.get("parts"):
        lines.append(
            "  parts        "
            + ", ".join(f"{k} {v}" for k, v in summary["parts"].items())
            + f", router {summary['router']}"
        )
    if summary.get("data"):
        data = summary["data"]
        lines.append(
            f"  text         {data['tokens']:,} tokens in sequences of {data['seq_len']}: {', '.join(f['name'] for f in data['files'])}"
        )
    if summary.get("protected"):
        lines.append(
            "  protected    super experts "
            + ", ".join(
                f"{e} of layer {n}" for n, es in list(summary["protected"].items())[:6] for e in es
            )
        )
    if summary.get("refit"):
        worst = max(summary["refit"].items(), key=lambda kv: kv[1]["error_after"])
        lines.append(
            f"  refit        largest squared error of a layer's output {worst[1]['error_before']:.1%} -> {worst[1]['error_after']:.1%} (layer {worst[0]})"
        )
    lines.append(
        f"  parameters   {show_count(summary['parameters'])}, {show_count(summary['active_parameters'])} active; experts {show_bytes(summary['expert_bytes_before'])} -> {show_bytes(summary['expert_bytes_after'])}"
    )
    lines.append(
        f"  output       {show_bytes(summary['output_bytes'])} in {summary['shards']} file{'s' * (summary['shards'] != 1)}, {summary['tensors']} tensors ({show_bytes(summary['free_disk'])} free)"
    )
    lines.append(
        f"  memory       at most {show_bytes(summary['peak_memory'])}, {summary['jobs']} worker{'s' * (summary['jobs'] != 1)}"
    )
    lines.append(
        f"  certificate  {summary['certificate']['level']}: {summary['certificate']['why']}"
    )
    if summary["counts"] == "ragged":
        lines.append(
            "  note         layers hold different numbers of experts (per_layer_config): stock transformers, vLLM and llama.cpp refuse this checkpoint; moetool eval reads it"
        )
    if summary["counts"] == "factored":
        lines.append(
            "  note         moetool's own form: stock loaders refuse it; moetool eval reads it"
        )
    if summary.get("quality"):
        q = summary["quality"]
        lines.append(
            f"  quality      KL {q['kl']:.4g}, perplexity {q['reference_perplexity']:.4g} -> {q['perplexity']:.4g} on {q['tokens']:,} predictions{'' if q['held_out'] else ' of the calibration text'}"
        )
    if summary.get("decisions_written"):
        lines.append(
            f"  decisions    written to {summary['decisions_written']}: edit them, and replay with --decisions"
        )
    if "seconds" in summary:
        lines.append(f"  done         {show_seconds(summary['seconds'])}; {session_note(summary)}")
    return "\n".join(lines)


def session_note(summary: dict[str, Any]) -> str:
    """Where to look next."""
    return f"report.json, decisions.json and experts.json stand beside the weights{', some files were there already' if summary.get('resumed_shards') else ''}"
