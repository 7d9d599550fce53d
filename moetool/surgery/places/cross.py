"""The attention of a decoder's layer to what the encoder gives."""

from __future__ import annotations

from moetool.surgery.places.attention import AttentionPlace


class CrossPlace(AttentionPlace):
    """its attention to what an encoder gives"""

    name = "cross"
    noun = "cross-attention"
