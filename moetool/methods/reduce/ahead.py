"""What is said before deciding begins: that the model will run, on how much, and at what cost."""

from __future__ import annotations

import os

from moetool.methods.reduce import cost
from moetool.methods.reduce.asked import Asked
from moetool.methods.reduce.options import Reducing
from moetool.methods.reduce.way import meant_by_auto


def line(asked: Asked) -> str:
    """A sentence for people; empty where no text goes through the model."""
    o = asked.options
    if not o.calibrate:
        return ""
    seen = _tokens(o)
    said = f"deciding sends up to {seen:,} tokens through the model"
    if asked.refits:
        work = cost.times(asked.mixture, asked.kept, seen, min(seen, o.refit_tokens))
        said += f", then a refit takes about {work:.2g} times that work (--no-refit leaves it out)"
    if not asked.settings.dry_run:
        return said
    other = meant_by_auto(asked.way.known(), text=False).name
    return f"{said}; --dry-run does all of that too, only --method {other} decides at once"


def _tokens(o: Reducing) -> int:
    """The most that calibration can be: no token of a file has less than a byte, few less than
    three.
    """
    sizes = [os.path.getsize(name) if os.path.isfile(name) else None for name in o.calibrate]
    known = [size for size in sizes if size is not None]
    return o.tokens if len(known) < len(sizes) else min(o.tokens, max(1, sum(known) // 3))
