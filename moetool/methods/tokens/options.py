"""What add-tokens can be told."""

from __future__ import annotations

from dataclasses import dataclass

from moetool.errors import UsageError
from moetool.methods.field import WHAT
from moetool.methods.options import Served, option

AUTO, MEAN, NORMAL, GW = "auto", "mean", "normal", "gw"


@dataclass(frozen=True)
class AddingTokens(Served):
    """The options of add-tokens."""

    tokens: int = option(
        0, "how many tokens; with --vectors as many as it has rows", WHAT, minimum=0
    )
    vectors: str = option(
        "",
        "a .safetensors file with one tensor [tokens, any width], for example the codebook of a VQ "
        "image tokenizer: what new tokens are to each other",
        WHAT,
        metavar="FILE",
    )
    init: str = option(
        AUTO,
        "how new rows start: gw (with --vectors: each as the tokens that have its place among "
        "others, by a Gromov-Wasserstein plan), mean (of all rows), normal (drawn with mean and "
        "deviation of each column); auto: gw with --vectors, else normal",
        WHAT,
        choices=(AUTO, MEAN, NORMAL, GW),
    )
    anchors: int = option(
        1024, "with --init gw: tokens of before that the plan looks at, drawn at random", minimum=2
    )

    def __post_init__(self) -> None:
        if not self.vectors and (not self.tokens or self.init == GW):
            raise UsageError(
                "--init gw needs vectors" if self.init == GW else "no tokens to add",
                expected="--vectors FILE.safetensors"
                + ("" if self.init == GW else " or --tokens N"),
                found=f"--tokens {self.tokens} alone",
                hint="a tensor [tokens, width], for example the codebook of image tokens",
            )
        if self.vectors and self.tokens:
            raise UsageError(
                "--vectors says how many tokens there are",
                expected="--vectors or --tokens",
                found="both",
                hint="leave out --tokens",
            )

    @property
    def way(self) -> str:
        """How rows start."""
        if self.init == AUTO:
            return GW if self.vectors else NORMAL
        return self.init
