"""`moetool profile` and `moetool eval`: send text through a model, one layer in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moetool.cli.compress import BatchTokens, MaxIncrease, MaxKl, Pack, SeqLen, TextField
from moetool.cli.main import app, session
from moetool.cli.upcycle import Device, Memory, Seed
from moetool.units import parse_bytes, show_bytes, show_seconds


@app.command()
def profile(
    moe: Annotated[
        str, typer.Argument(metavar="MOE", help="a mixture of experts: a folder, or a Hub id")
    ],
    stats: Annotated[
        str,
        typer.Argument(
            metavar="STATS", help="folder for the statistics; an unfinished one is taken up again"
        ),
    ],
    calibrate: Annotated[
        list[str],
        typer.Option(
            "--calibrate",
            metavar="FILE[:SHARE]",
            help="text: .txt, .jsonl, .parquet, a Hub dataset, or - for standard input; repeat it",
        ),
    ] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="tokens of text, over all files")] = 262_144,
    seq_len: SeqLen = 2048,
    pack: Pack = True,
    text_field: TextField = "",
    batch_tokens: BatchTokens = 4096,
    sample: Annotated[
        int,
        typer.Option(help="tokens of a layer on which all experts run, and whose inputs are kept"),
    ] = 2048,
    covariance: Annotated[
        bool,
        typer.Option(
            "--covariance",
            help="keep second moments of inputs too, for whitening (large: hidden^2 + experts x width^2 numbers a layer)",
        ),
    ] = False,
    seed: Seed = 0,
    memory: Memory = "",
    device: Device = "cpu",
) -> int:
    """See what each expert does with text, and keep it: one profile feeds every method of prune
    and merge.
    """
    from moetool import measure

    session.working = True
    found = measure.profile(
        moe,
        stats,
        calibrate=calibrate,
        tokens=tokens,
        seq_len=seq_len,
        pack=pack,
        text_field=text_field,
        batch_tokens=batch_tokens,
        sample=sample,
        covariance=covariance,
        seed=seed,
        memory=parse_bytes(memory) if memory else None,
        device=device,
        tell=session.sink.steps,
        stop=session.stop,
    )
    session.working = False
    for line in found["warnings"]:
        session.sink.say(f"warning: {line}")
    session.sink.result(found)
    if session.sink.mode == "human":
        _show_profile(found)
    return 0


def _show_profile(found: dict[str, Any]) -> None:
    sink = session.sink
    sink.result(
        None,
        f"{found['model']['name']}: {found['experts']} experts, top-{found['top_k']}, {len(found['layers'])} layers; {found['tokens']:,} tokens in sequences of {found['seq_len']} ({show_seconds(found['seconds'])}, at most {show_bytes(found['peak_memory'])})",
    )
    sink.table(
        [
            "layer",
            "least used",
            "most used",
            "idle",
            "largest |out|",
            "output cosine",
            "REAP least / most",
        ],
        [
            [
                r["layer"],
                f"{r['least_used']:.1%}",
                f"{r['most_used']:.1%}",
                r["idle"],
                f"{r['max_out']:.3g}",
                "-" if r["cosine"] is None else f"{r['cosine']:.2f}",
                f"{r['reap_least']:.3g} / {r['reap_most']:.3g}",
            ]
            for r in found["summary"]
        ],
    )
    if found["super_experts"]:
        sink.result(
            None,
            "super experts: "
            + ", ".join(
                f"{e} of layer {n}" for n, es in found["super_experts"].items() for e in es
            ),
        )
    if len(found["domains"]) > 1:
        sink.table(
            ["file", "share", "use of experts differs from the mix by"],
            [[d["file"], f"{d['share']:.0%}", f"{d['apart']:.1%}"] for d in found["domains"]],
        )


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="a folder, or a Hub id; larger than memory is fine"),
    ],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="FILE",
            help="text: .txt, .jsonl, .parquet, a Hub dataset, or - for standard input; repeat it",
        ),
    ] = [],  # noqa: B006
    reference: Annotated[
        str,
        typer.Option(
            metavar="ORIGINAL", help="what it was made from: adds KL, top-1 agreement and flips"
        ),
    ] = "",
    tokens: Annotated[int, typer.Option(help="tokens, over all files")] = 131_072,
    seq_len: SeqLen = 2048,
    pack: Pack = True,
    text_field: TextField = "",
    batch_tokens: BatchTokens = 4096,
    max_kl: MaxKl = 0.0,
    max_perplexity_increase: MaxIncrease = "",
    memory: Memory = "",
    device: Device = "cpu",
) -> int:
    """Perplexity for each file; with --reference, how far the model is from the original. One
    layer in memory at a time.
    """
    from moetool import measure

    session.working = True
    found = measure.evaluate(
        model,
        text=text,
        reference=reference,
        tokens=tokens,
        seq_len=seq_len,
        pack=pack,
        text_field=text_field,
        batch_tokens=batch_tokens,
        max_kl=max_kl,
        max_perplexity_increase=max_perplexity_increase,
        memory=parse_bytes(memory) if memory else None,
        device=device,
        tell=session.sink.steps,
        stop=session.stop,
    )
    session.working = False
    for line in found["notes"]:
        session.sink.say(f"note: {line}")
    session.sink.result(found)
    if session.sink.mode == "human":
        _show_eval(found, bool(reference))
    return 0


def _show_eval(found: dict[str, Any], with_reference: bool) -> None:
    head = ["file", "predictions", "perplexity"] + (
        ["original", "increase", "KL", "same top-1", "flips"] if with_reference else []
    )
    rows = []
    for row in [*found["files"], {"file": "all", **found}]:
        cells = [Path(str(row["file"])).name, f"{row['tokens']:,}", f"{row['perplexity']:.4g}"]
        if with_reference:
            cells += [
                f"{row['reference_perplexity']:.4g}",
                f"{row['perplexity_increase']:+.1%}",
                f"{row['kl']:.4f}",
                f"{row['top1_agreement']:.1%}",
                f"{row['flips']:.1%}",
            ]
        rows.append(cells)
    session.sink.table(head, rows if len(rows) > 2 else rows[:1])
