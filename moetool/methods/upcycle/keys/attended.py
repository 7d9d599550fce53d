"""The text of the prompt as an image sees it."""

from __future__ import annotations

from moetool.data import JsonObject
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.keys.modality import image_token


class AttendedKey(RouteKey):
    """The text of the prompt as an image sees it, with --tower projector: the first token that the
    projector gives, as [CLS] is, attends over the embeddings of the text, and what it finds chooses
    experts for all tokens of the image. Parrot (arXiv 2406.02539).
    """

    name = "attended"
    apart = False

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        return {"ids": [image_token(ground, "leave out --key")], "width": ground.given}
