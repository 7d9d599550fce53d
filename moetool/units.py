"""Sizes, counts and times as people write and read them."""

from __future__ import annotations

import math
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


LARGEST = 2**63  # bytes; no file system holds more


STRENGTH = 1e4  # a factor or a standard deviation; five times it is still a number in float16


def parse_number(text: str | float, *, largest: float = math.inf) -> float:
    """`0.02` -> 0.02; raises ValueError on anything else, on what is not finite (a limit of nan
    would hold back nothing), and on what is further from 0 than `largest`.
    """
    number = float(text)
    if not math.isfinite(number) or abs(number) > largest:
        raise ValueError(f"{text!r} is not a finite number of at most {largest:g}")
    return number


def parse_bytes(text: str | int) -> int:
    """`5GB` -> 5000000000, `64MiB` -> 67108864, a plain number is bytes; raises UsageError on
    anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(text), re.IGNORECASE)
    size = float(found[1]) * _POWERS[(found[2] or "").lower()] if found else 0.0
    if not 0 < size < LARGEST:
        raise UsageError(
            f"{str(text)[:60]!r} is not a size", hint="write it like 2GB, 512MiB or 1000000"
        )
    return int(size)


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
    share = float(found[1]) / (100 if found[2] else 1) if found else math.inf
    if not math.isfinite(share):
        raise UsageError(
            f"{str(text)[:60]!r} is not a percentage", hint="write it like 0.25 or 25%"
        )
    return share
