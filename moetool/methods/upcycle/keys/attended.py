"""The text of the prompt as an image sees it."""

from __future__ import annotations

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.surgery.layout import words


class AttendedKey(RouteKey):
    """The text of the prompt as an image sees it, with --tower projector: the first token that the
    projector gives, as [CLS] is, attends over the embeddings of the text, and what it finds chooses
    experts for all tokens of the image. Parrot (arXiv 2406.02539).
    """

    name = "attended"
    apart = False

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        return {"ids": self.ids(ground), "width": ground.given}

    def ids(self, ground: Ground) -> list[int]:
        """The tokens that stand for an image. UsageError where the config names none."""
        found = words().images_of(ground.source.config)
        if not found:
            raise UsageError(
                "the config names no token that stands for an image",
                file=f"{ground.source.folder}/config.json",
                expected=" or ".join(words().images),
                found="none",
                hint="leave out --key",
            )
        return [found[0]]
