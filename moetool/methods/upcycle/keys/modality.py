"""What kind of token it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.masked import Masked, MaskedKey, choosing, table
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.surgery import places
from moetool.surgery.groups import LINEAR, Group
from moetool.surgery.layout import words
from moetool.surgery.route import MODALITY

_MOST = 1 << 20  # ids in a range: a config names each


@dataclass(frozen=True)
class Modalities(Masked):
    """The options of the key."""

    modality_ids: str = option(
        "",
        "token ids of each modality beside text, for example 32000 or 32000-40191/40192,40193; as "
        "the config says where it names an image token",
        WHAT,
        metavar="IDS[/IDS]",
    )


class ModalityKey(MaskedKey):
    """What kind of token it is: text has the first expert alone (with whole copies: the FFN, which
    is computed as before whatever becomes of the copies), the others have the rest.

    Mono-InternVL (arXiv 2410.08202): one copy for image tokens. MoIIE (arXiv 2508.09779): a pool
    that both share, and a router for each.
    """

    name = MODALITY
    Options: ClassVar[type] = Modalities
    own: Modalities
    sites = (*MaskedKey.sites, LINEAR)
    alone = False  # what is added to a linear: text goes without

    def told(self, site: str, law: RouteLaw) -> None:
        super().told(site, law)
        self.alone = site == LINEAR
        if self.alone and law.name != "hard":
            raise UsageError(
                f"--law {law.name} weighs experts, and text has none at --site {site}",
                expected="--law hard",
                found=f"--key {self.name} --site {site} --law {law.name}",
                hint="add --law hard: tokens of other modalities have the first of theirs",
            )

    def check(self, ground: Ground, choices: int, top_k: int) -> None:
        ids = self.ids(ground)
        self._table(len(ids) + 1, choices, top_k)
        vocab, every = ground.at.field("vocab"), [*chain.from_iterable(ids)]
        beyond = [n for n in every if not 0 <= n < (vocab or n + 1)]
        if beyond:
            raise UsageError(
                "--modality-ids are no tokens of the model",
                expected=f"0 to {vocab - 1}",
                found=beyond,
                hint="see the tokenizer's added tokens",
            )
        twice = sorted({n for n in every if every.count(n) > 1})
        if twice:
            raise UsageError(
                "--modality-ids say a token twice",
                expected="each id once: a token is of one modality",
                found=twice,
                hint="leave them out of one",
            )

    def _table(self, kinds: int, choices: int, top_k: int) -> list[list[int]]:
        rest = choices - 1
        if self.alone:
            usual = "/".join(["0" * choices, *["1" * choices] * (kinds - 1)])
            return table(self.own.allowed, usual, kinds, choices, top_k, idle=True)
        if not rest:
            raise UsageError(
                "text has the only expert",
                expected="--experts 2 or more",
                found="--experts 1",
                hint="one expert for text, one or more for the others",
            )
        usual = "/".join(["1" + "0" * rest, *["0" + "1" * rest] * (kinds - 1)])
        return table(self.own.allowed, usual, kinds, choices, top_k)

    def ids(self, ground: Ground) -> list[list[int]]:
        """Token ids of each modality beside text. UsageError where nothing says them."""
        if self.own.modality_ids:
            try:
                rows = self.own.modality_ids.split("/")
                each = ([_ids(one) for one in row.split(",")] for row in rows)
                return [[*chain.from_iterable(row)] for row in each]
            except ValueError:
                raise UsageError(
                    "--modality-ids are no numbers",
                    expected="token ids, for example 32000 or 32000-40191/40192,40193",
                    found=self.own.modality_ids,
                    hint="`/` stands between modalities",
                ) from None
        return [[image_token(ground, "say the ids: --modality-ids 32000")]]

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        ids = self.ids(ground)
        rows = self._table(len(ids) + 1, choices, top_k)
        return {"ids": ids, **choosing(self.own, rows, top_k)}

    def certificate(self, made: Certificate, group: Group) -> Certificate:
        alone = group.route.options["allowed"][0] == [1] + [0] * group.experts
        if made.level != "exact" or group.base != "member" or not alone:
            return made
        noun = places.named(group.site).noun
        return replace(made, why=f"{made.why}; text has the {noun} alone, for good")


def _ids(said: str) -> range:
    """`7` or `7-9`; ValueError for anything else."""
    first, _, last = said.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not 0 < len(found) <= _MOST:
        raise ValueError(said)
    return found


def image_token(ground: Ground, hint: str) -> int:
    """The token that stands for an image. UsageError where the config names none."""
    found = words().images_of(ground.source.config)
    if found:
        return int(found[0])
    raise UsageError(
        "the config names no token that stands for an image",
        file=f"{ground.source.folder}/config.json",
        expected=" or ".join(words().images),
        hint=hint,
    )
