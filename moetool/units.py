"""Sizes, counts and times as people write and read them."""

from __future__ import annotations

import re

from moetool.errors import UsageError

_POWERS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_bytes(text: str | int) -> int:
    """`5GB` -> 5000000000, `64MiB` -> 67108864, a plain number is bytes; raises UsageError on
    anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(text), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UsageError(f"{text!r} is not a size", hint="write it like 2GB, 512MiB or 1000000")
    return int(float(found[1]) * _POWERS[(found[2] or "").lower()])


def show_bytes(count: float) -> str:
    """1234567 -> `1.23 MB` (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def show_count(count: float) -> str:
    """134515008 -> `134.5 M`."""
    for unit in ("", " K", " M", " B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def show_seconds(seconds: float) -> str:
    """75.2 -> `1m15s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def parse_share(text: str | float) -> float:
    """`25%` -> 0.25, `0.25` -> 0.25; raises UsageError on anything else."""
    found = re.fullmatch(
        r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(%?)\s*", str(text), re.IGNORECASE
    )
    if not found:
        raise UsageError(f"{text!r} is not a share", hint="write it like 0.25 or 25%")
    return float(found[1]) / (100 if found[2] else 1)
