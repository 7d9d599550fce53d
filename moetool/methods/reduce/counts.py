"""How many experts a router needs, and how many layers may keep."""

from __future__ import annotations

from moetool.errors import MoetoolError
from moetool.methods.reduce.decided import Decided
from moetool.surgery.experts import Mixture


def checked_counts(decided: Decided, mixture: Mixture) -> None:
    """Refuse decisions that leave a router less than it needs. Raises MoetoolError before any work."""
    for number, layer in decided.layers.items():
        check_count(mixture, layer.count, number)
        if mixture.groups > 1 and number in mixture.layers:
            size = mixture.experts // mixture.groups
            kept = [sum(e // size == g for e in layer.leads) for g in range(mixture.groups)]
            if len(set(kept)) > 1:
                raise MoetoolError(
                    "the groups of a group-limited router must stay equal",
                    tensor=f"layer {number}",
                    expected=f"{layer.count // mixture.groups} experts in each of {mixture.groups} groups",
                    found=kept,
                    hint="keep as many in each group",
                )


def check_count(mixture: Mixture, count: int, layer: int | None = None) -> None:
    """Refuse fewer experts than a token needs; group-limited routers reach only their best groups."""
    where = {} if layer is None else {"tensor": f"layer {layer}"}
    reach = count + mixture.zero_experts
    text = mixture.text
    if mixture.groups > 1:
        if count % mixture.groups:
            raise MoetoolError(
                "the groups of a group-limited router must stay equal",
                **where,
                expected=f"a multiple of {mixture.groups} experts",
                found=count,
                hint="choose another --ratio",
            )
        reach = count // mixture.groups * int(text.get("topk_group") or 1)
    if reach < mixture.top_k:
        raise MoetoolError(
            "too few experts would be left",
            **where,
            expected=f"at least {mixture.top_k} within a token's reach (its top-k)",
            found=f"{count} kept"
            + (f", {reach} in reach of the groups" if mixture.groups > 1 else ""),
            hint="lower --ratio",
        )
