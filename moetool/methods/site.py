"""SITE: which layers get experts."""

from __future__ import annotations

import re

from moetool.errors import UsageError

FORMS = "all, none, every:N[+OFFSET], first-half, second-half, last:N, or a list like 0,2,5-7"


def parse(spec: str, count: int) -> tuple[int, ...]:
    """Layer numbers of a model with `count` layers; UsageError for a form or a number that does
    not exist.
    """
    every = range(count)
    if spec == "all":
        return tuple(every)
    if spec == "none":
        return ()
    if spec == "first-half":
        return tuple(every[: count // 2])
    if spec == "second-half":
        return tuple(every[count // 2 :])
    if found := re.fullmatch(r"every:([1-9]\d*)(?:\+(\d+))?", spec):
        chosen = tuple(every[int(found[2] or 0) :: int(found[1])])
    elif found := re.fullmatch(r"last:([1-9]\d*)", spec):
        chosen = tuple(every[-int(found[1]) :]) if int(found[1]) <= count else (count,)
    elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", spec):
        chosen = tuple(sorted(set().union(*(_span(part, count) for part in spec.split(",")))))
    else:
        raise UsageError(
            f"--layers {spec!r} is not understood",
            expected=FORMS,
            hint="for example --layers every:2",
        )
    if not chosen or chosen[-1] >= count:
        raise UsageError(
            f"--layers {spec} names a layer that is not there",
            expected=f"layers 0 to {count - 1}",
            hint=f"forms: {FORMS}",
        )
    return chosen


def _span(part: str, count: int) -> range:
    """The layers of `3` or `3-5`; one beyond the last stands for all that are not there."""
    first, _, last = part.partition("-")
    return range(_number(first, count), _number(last or first, count) + 1)


def _number(digits: str, count: int) -> int:
    return min(int(digits), count) if len(digits) < 10 else count
