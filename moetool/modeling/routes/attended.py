"""The text of the prompt as an image sees it (Parrot, arXiv 2406.02539)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moetool.errors import UsageError
from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import IDS, KEPT, PROMPT, WORDS, Heard
from moetool.modeling.spans import Span
from moetool.surgery.groups import Group


class AttendedScorer(Scorer):
    """The first token of an image, as [CLS] is, after the projector, attends over the embeddings of
    the prompt's text: softmax(cls T^T / sqrt(d)) T goes through one linear (`weight` [choices,
    width]). All tokens of an image have the same scores. options of the route: ids, the tokens that
    stand for an image; width, of what the projector gives.

    Images belong to the sequences whose ids have as many such tokens as they are long; one without
    any text in its prompt has scores of 0.
    """

    name: ClassVar[str] = "attended"
    reads: ClassVar[tuple[str, ...]] = (PROMPT, WORDS)
    sites: ClassVar[tuple[str, ...]] = ("ffn",)
    after: ClassVar[bool] = True
    span = Span()
    weight: Tensor

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        self.ids: list[int] = group.route.options["ids"]

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        images, each = heard.read(KEPT).shape
        ids, words = heard.read(IDS).to(x.device), heard.read(WORDS).to(x)
        stands = torch.isin(ids, torch.tensor(self.ids, device=x.device))
        owner = _owners(stands.sum(-1), images, each)
        text = heard.read(PROMPT).to(x.device) & ~stands
        cls = x.view(images, each, -1)[:, 0]
        scores = torch.einsum("id,ild->il", cls, words[owner]) / cls.shape[-1] ** 0.5
        there = text[owner]
        share = scores.float().masked_fill(~there, -torch.inf).softmax(-1)
        share = share.masked_fill(~there.any(-1, keepdim=True), 0).to(x.dtype)
        key = torch.einsum("il,ild->id", share, words[owner])
        return functional.linear(key, self.weight).repeat_interleave(each, 0)


def _owners(counts: Tensor, images: int, each: int) -> Tensor:
    """The sequence of each image [images], where sequences have so many tokens of images."""
    if int(counts.sum()) != images * each or bool((counts % each).any()):
        raise UsageError(
            "images do not lie in the text as the route by attended text needs it",
            expected=f"{each} tokens for each of {images} images",
            found=f"{counts.tolist()} in the sequences",
            hint="images of one size, without newline tokens among them",
        )
    rows = torch.arange(len(counts), device=counts.device)
    return rows.repeat_interleave(counts // each)
