"""moetool merge: clusters of experts become one expert each, and the checkpoint really gets
smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

from moetool.methods.field import WHAT
from moetool.methods.merge.combine import COMBINE
from moetool.methods.merge.options import Merging
from moetool.methods.merge.way import MergeWay
from moetool.methods.options import option
from moetool.methods.reduce.verb import Reduce
from moetool.methods.reduce.way import auto_help


def _combines() -> tuple[str, ...]:
    """Those that any way can use, and those that only one runs."""
    own = (way.combines for way in MergeWay.known().values())
    return ("auto", *COMBINE, *filter(None, own))


@dataclass(frozen=True)
class MergeOptions(Merging):
    """What merge is told."""

    method: str = option(
        "auto",
        lambda: auto_help(MergeWay.known()),
        WHAT,
        choices=lambda: ("auto", *MergeWay.known()),
    )
    combine: str = option(
        "auto",
        "how a cluster becomes one: svd is the truncated union SVD (untruncated it is the weighted mean), least-squares the mean with down_proj solved again",
        WHAT,
        choices=_combines,
    )


class Merge(Reduce):
    """Merge experts of a mixture of experts into fewer. The checkpoint really gets smaller, and the
    report says what became of the router.

    The union SVD without truncation and whitening is the weighted mean under another name;
    --rank-energy and --whiten make it differ. --method names a published choice of the parts;
    every part can be chosen alone.
    """

    Options = MergeOptions
    Base = MergeWay
    verb = "merge"
    examples = (
        "moetool merge demo merged --ratio 0.25",
        "moetool merge SRC OUT --ratio 50% --method ream --calibrate text.jsonl",
        "moetool merge SRC OUT --method hc-smoe --align activations --calibrate text.jsonl",
    )
