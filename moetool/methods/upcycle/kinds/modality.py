"""Copies of the FFN for tokens of other modalities than text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery.groups import MODALITY, Group
from moetool.surgery.layout import words
from moetool.surgery.reform import Into


@dataclass(frozen=True)
class Modalities:
    """The options of experts by modality."""

    modality_ids: str = option(
        "",
        "token ids of each modality beside text, for example 32000 or 32000,32001/32002; as the "
        "config says where it names an image token",
        WHAT,
        metavar="IDS[/IDS]",
    )
    allowed: str = option(
        "",
        "who may use what: for each modality, text first, a digit for the FFN and each copy, for "
        "example 0111/1110; by default text has the FFN, the others the copies",
        metavar="0111/1110",
    )
    routers: str = option(
        "one",
        "where a token has a choice: one router for all, or each modality its own",
        choices=("one", "each"),
    )


class ModalityKind(ExpertKind):
    """Whole copies of the FFN for tokens that are no text: text keeps the FFN alone, and is
    computed as before whatever becomes of the copies.

    Mono-InternVL (arXiv 2410.08202): one copy for image tokens. MoIIE (arXiv 2508.09779): a pool
    that both share, and a router for each.
    """

    name = MODALITY
    Options: ClassVar[type] = Modalities
    own: Modalities
    base = "member"

    def allowed(self, modalities: int) -> list[list[int]]:
        """[modalities][FFN and copies] of 0 and 1. UsageError where it is not understood."""
        copies, top_k = self.verb.experts, self.verb.top_k
        said = self.own.allowed or "/".join(
            ["1" + "0" * copies, *["0" + "1" * copies] * (modalities - 1)]
        )
        rows = said.split("/")
        wrong = [r for r in rows if len(r) != 1 + copies or set(r) - {"0", "1"} or "1" not in r]
        if wrong or len(rows) != modalities or any(r.count("1") < top_k for r in rows):
            raise UsageError(
                "--allowed does not fit" if self.own.allowed else "text has the FFN alone",
                expected=f"{modalities} rows of {1 + copies} digits 0 or 1, at least --top-k "
                f"{top_k} of them 1",
                found=said,
                hint="--top-k 1, or for example --experts 3 --top-k 2 --allowed 0111/1110",
            )
        return [[int(digit) for digit in row] for row in rows]

    def ids(self, ground: Ground) -> list[list[int]]:
        """Token ids of each modality beside text. UsageError where nothing says them."""
        if self.own.modality_ids:
            try:
                rows = self.own.modality_ids.split("/")
                return [[int(one) for one in row.split(",")] for row in rows]
            except ValueError:
                raise UsageError(
                    "--modality-ids are no numbers",
                    expected="token ids, for example 32000 or 32000,32001/32002",
                    found=self.own.modality_ids,
                    hint="`/` stands between modalities",
                ) from None
        config = ground.source.config
        found = [config[n] for n in words().images if isinstance(config.get(n), int)]
        if not found:
            raise UsageError(
                "the config names no token that stands for an image",
                file=f"{ground.source.folder}/config.json",
                expected=" or ".join(words().images),
                hint="say the ids: --modality-ids 32000",
            )
        return [[found[0]]]

    def check(self, ground: Ground) -> None:
        ids = self.ids(ground)
        self.allowed(1 + len(ids))
        vocab = ground.at.field("vocab")
        beyond = [n for n in chain.from_iterable(ids) if not 0 <= n < (vocab or n + 1)]
        if beyond:
            raise UsageError(
                "--modality-ids are no tokens of the model",
                expected=f"0 to {vocab - 1}",
                found=beyond,
                hint="see the tokenizer's added tokens",
            )

    def group(self, ground: Ground) -> Group:
        ids = self.ids(ground)
        allowed = self.allowed(1 + len(ids))
        choice = any(sum(row) > self.verb.top_k for row in allowed)
        options: JsonObject = {"allowed": allowed, "ids": ids}
        options |= {"routers": self.own.routers} if choice else {}
        made = super().group(ground)
        route = replace(made.route, key=MODALITY, options=options)
        return replace(made, form="full", route=route)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        for expert, linear in spot.each():
            spot.copy(build, expert, linear)
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        allowed: Sequence[Sequence[int]] = group.route.options["allowed"]
        alone = allowed[0] == [1] + [0] * group.experts
        made = super().certificate(group, sources)
        if made.level != "exact" or not alone:
            return made
        return Certificate("exact", f"{made.why}; text has the FFN alone, for good")
