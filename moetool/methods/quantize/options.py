"""What `quantize` is told."""

from __future__ import annotations

from dataclasses import dataclass

from moetool.errors import UsageError
from moetool.methods.field import FINE, WHAT
from moetool.methods.options import Gate, Served, Text, option, same
from moetool.surgery import forms

DEFAULT = "int4"


@dataclass(frozen=True)
class Formats(Served):
    """Which matrices become what."""

    format: str = option(
        "",
        lambda: (
            "format of every linear, WORD or WORD/GROUP (int4/64); default: int4, or chosen for "
            f"--target-size or --max-kl. {', '.join(forms.formats())}"
        ),
        WHAT,
        metavar="FORMAT",
    )
    group_size: int | None = option(
        None,
        "neighbours along the input that share a scale, where --format names none (0: a whole row)",
        WHAT,
        minimum=0,
        metavar="N",
    )
    plan: str = option(
        "",
        "a format by role, instead of --format: experts=int4/128,attn=int8/128,shared=...,dense=...,"
        "lm_head=...; full leaves a role as it is",
        WHAT,
        metavar="ROLE=FORMAT,...",
    )
    target_size: int | None = option(
        None,
        "choose the format of each role: the plan of at most this size (weights, config, "
        "tokenizer) that loses the least, measured with --calibrate. With --max-kl alone: the "
        "smallest plan within it",
        WHAT,
        unit="bytes",
        metavar="SIZE",
        minimum=1,
    )
    fit_tokens: int = option(
        4096,
        "tokens of --calibrate on which plans are compared",
        FINE,
        minimum=64,
        needs=("target_size", "max_kl"),
    )
    method: str = option("auto", "", WHAT)
    for_: tuple[str, ...] = same(
        Served,
        "for_",
        default=("auto",),
        help="clients that must read it (auto: its format by transformers5, or llama.cpp where it is "
        "GGUF); what one of them refuses or reads wrongly is refused before any work",
    )
    loader_check: bool = option(
        True,
        "load the first layers with the loader of --for, in a process of its own, and compare every "
        "parameter by value; where it is not installed, that is said",
        FINE,
    )
    force: bool = option(
        False, "write what the loader of --for cannot read, and say so in the report", FINE
    )


@dataclass(frozen=True)
class Quantizing(Gate, Text, Formats):
    """Everything that quantize is told."""

    @property
    def serves(self) -> tuple[str, ...]:
        """What --force writes is for whoever reads it."""
        return () if self.force else self.named

    def __post_init__(self) -> None:
        self.check_one_text()
        told = self.format or self.plan or self.group_size is not None
        if self.target_size and told:
            raise UsageError(
                "--target-size chooses the formats",
                found="--plan" if self.plan else "--format or --group-size beside it",
                hint="give one or the other",
            )
        if self.fits and not self.target_size and not self.calibrate:
            raise UsageError(
                "--max-kl alone chooses the smallest plan within it, by what it does to text",
                expected="--calibrate FILE",
                found="no text",
                hint="give text, or the formats: --format or --plan",
            )

    @property
    def fits(self) -> bool:
        """Whether the formats are to be chosen."""
        open_ = not (self.format or self.plan or self.group_size is not None)
        return bool(self.target_size) or (open_ and self.max_kl > 0)

    @property
    def has_text(self) -> bool:
        """Whether there is text, or what text showed."""
        return bool(self.calibrate or self.stats)
