"""The first token of a sequence."""

from __future__ import annotations

from moetool.methods.upcycle.keys.key import RouteKey


class SequenceKey(RouteKey):
    """The first token of a sequence, as [CLS] is: what the FFN sees of it chooses experts for all
    of the sequence.
    """

    name = "sequence"
    apart = False
