"""The plan that gives a model fewer experts: kept experts move byte for byte, merged ones are
computed, and every tensor that counts experts is cut alike: router rows, selection biases,
per-expert scales, id tables, MTP layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder
from moetool.methods.reduce.decision import Decided, Layer
from moetool.surgery import reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Counted, Mixture, strays
from moetool.surgery.plan import Plan
from moetool.surgery.reform import Wanted
from moetool.surgery.spec import FLOATS, Piece, Target, whole

LAYOUTS = ("uniform", "zeroed", "ghost", "ragged")
ROUTERS = ("centroid", "mean", "logsumexp")
NEVER = -1e30  # a selection bias that no score overcomes


@dataclass(frozen=True)
class Cluster:
    """Everything a maker of merged experts needs: the members' pieces by role, their weights,
    where they lie.
    """

    layer: int
    number: int
    members: tuple[int, ...]
    weights: tuple[float, ...]
    pieces: tuple[dict[str, Piece], ...]
    form: dict[str, Any]


# Plans one merged expert: (builder, cluster, {role: output piece}).
Maker = Callable[[Builder, Cluster, dict[str, Piece]], None]


def solved_name(layer: int, expert: int, role: str) -> str:
    """Name of a tensor that deciding computed for a new expert, in the second source."""
    return f"{layer}.{expert}.{role}"


class Cut:
    """Builds the plan. `extra` are sources beyond the model (statistics, solved tensors); `maker`
    plans merged experts.
    """

    def __init__(
        self,
        mixture: Mixture,
        decided: Decided,
        *,
        layout: str,
        router: str,
        maker: Maker | None = None,
        sparse: Maker | None = None,
        extra: Sequence[Checkpoint] = (),
    ) -> None:
        (
            self.mixture,
            self.decided,
            self.layout,
            self.router,
            self.maker,
            self.sparse,
            self.extra,
        ) = mixture, decided, layout, router, maker, sparse, extra
        self.build = Builder()
        self.tables: dict[str, list[int]] = {}
        self.uniform = self._uniform()
        self._solved = {
            name: (number, c) for number, c in enumerate(extra, 1) for name in c.tensors
        }

    def plan(
        self, max_shard: int, tables: Mapping[str, list[int]] | None = None
    ) -> tuple[Plan, dict[str, Any]]:
        """(plan, config). Every source tensor is used, cut, or refused."""
        lost = next(strays(self.mixture), None)
        if lost:
            raise MoetoolError(
                "a tensor speaks of experts but its family does not know it",
                file=self.mixture.source.folder,
                tensor=lost,
                hint="it cannot be cut, and is not left behind in silence: remove it, or report the family",
            )
        source, done = self.mixture.source, set()
        for name in sorted(
            source.tensors, key=lambda n: (source.tensors[n].file, source.tensors[n].start)
        ):
            counted = self.mixture.counted.get(name)
            if counted is None:
                stored = source.tensors[name]
                self.build.copy(
                    whole(stored), whole(self.build.target(name, stored.dtype, stored.shape))
                )
            elif counted.layer not in done:
                done.add(counted.layer)
                self._layer(counted.layer)
        config = self._config()
        wanted = Wanted(config, self.build.targets, self.build.tasks, self._dropped())
        plan = reform.plan(
            [source, *self.extra],
            wanted,
            max_shard=max_shard,
            tables={**self.tables, **(tables or {})},
        )
        return plan, plan.config

    def _dropped(self) -> dict[str, str]:
        """Tensors of experts that went, by name (of stacks only rows go)."""
        used = {p.name for t in self.build.tasks for p in t.inputs if p.source == 0}
        return {
            n: f"expert {c.expert} of layer {c.layer} was removed"
            for n, c in sorted(self.mixture.counted.items())
            if c.expert is not None and n not in used
        }

    def _uniform(self) -> int:
        """The number of experts that the config will say."""
        counts = {layer.count for layer in self.decided.layers.values()}
        if self.layout == "zeroed":
            return self.mixture.experts
        if len(counts) > 1 and self.layout == "uniform":
            raise UsageError(
                "layers would keep different numbers of experts",
                expected="one number (--layout uniform)",
                found=sorted(counts),
                hint="--layout zeroed (loads everywhere, saves nothing), ghost (exact where the router has a selection bias), or ragged (no stock loader reads it)",
            )
        return max(counts)

    def _config(self) -> dict[str, Any]:
        changed = self.mixture.fields(self.uniform)
        if self.layout == "ragged":
            own = self.mixture.layout.fields["experts"]
            changed |= {
                "per_layer_config": {
                    str(n): {own: layer.count}
                    for n, layer in sorted(self.decided.layers.items())
                    if n in self.mixture.layers
                },
                "allow_global_per_layer_attribute_access": True,
            }
        return self.mixture.config_with(changed)

    def _layer(self, number: int) -> None:
        layer = self.decided.layers[number]
        tensors = self.mixture.by_layer[number]
        slots = self._slots(number, layer)
        stacks = {
            c.stored.name: self.build.target(c.stored.name, c.stored.dtype, c.shape(len(slots)))
            for c in tensors
            if c.kind == "expert" and c.expert is None
        }
        for new, group in enumerate(slots):
            self._expert(number, layer, new, group, stacks)
        for c in tensors:
            if (
                c.kind == "expert" and c.expert is not None and c.expert >= self.mixture.experts
            ):  # LongCat writes gate and up for zero experts
                self.build.copy(
                    whole(c.stored),
                    whole(
                        self.build.target(
                            c.named(c.expert - self.mixture.experts + len(slots)),
                            c.stored.dtype,
                            c.stored.shape,
                        )
                    ),
                )
            elif c.kind == "router":
                self._side(c, layer, slots)
            elif c.kind == "ids":
                self._ids(c, number, layer)

    def _slots(self, number: int, layer: Layer) -> list[int | None]:
        """For each expert of the output the group it comes from; None for one that is only there
        to be counted.
        """
        if self.layout == "zeroed":
            to = layer.map(self.mixture.experts)
            return [
                to[e] if to[e] is not None and layer.groups[to[e] or 0][0] == e else None
                for e in range(self.mixture.experts)
            ]
        missing = self.uniform - layer.count if self.layout == "ghost" else 0
        if missing and (self.mixture.side(number, "router.bias") is None):
            raise UsageError(
                f"ghost experts need a selection bias, and {self.mixture.layout.model_type} has none",
                tensor=f"layer {number}",
                hint="--layout zeroed or ragged, or --budget uniform",
            )
        if missing and self.mixture.groups > 1:
            raise UsageError(
                "ghost experts would shift the groups of a group-limited router",
                tensor=f"layer {number}",
                hint="--budget uniform, or --layout zeroed",
            )
        return [*range(layer.count), *[None] * missing]

    def _expert(
        self, number: int, layer: Layer, new: int, group: int | None, stacks: Mapping[str, Target]
    ) -> None:
        """One expert of the output: copied, computed, taken from what was solved, or zero."""
        members = (
            layer.groups[group] if group is not None else (layer.groups[0][0],)
        )  # a zero expert takes the shapes of the first
        outs, kinds = self._outputs(number, members[0], new, stacks)
        constant = group is not None and members[0] in layer.constant
        if group is None or constant:
            for c, out in outs:
                solved = (
                    self._solved.get(solved_name(number, members[0], c.role)) if constant else None
                )
                if solved:
                    self.build.copy(
                        Piece(solved_name(number, members[0], c.role), out.shape, 0, solved[0]), out
                    )
                else:
                    self.build.tasks.append(_zeros(out))
            return
        if len(members) == 1 and self.sparse is not None and layer.sparsity:
            self.sparse(
                self.build,
                self._cluster(number, layer, new, members, group),
                {c.role: out for c, out in outs},
            )
            return
        solved = {
            c.role: self._solved[solved_name(number, group, c.role)][0]
            for c, _ in outs
            if solved_name(number, group, c.role) in self._solved
        }
        if len(members) == 1:
            for c, out in outs:
                self.build.copy(
                    Piece(solved_name(number, group, c.role), out.shape, 0, solved[c.role])
                    if c.role in solved
                    else c.slab(members[0])
                    if c.expert is None
                    else whole(kinds[c.role][members[0]].stored),
                    out,
                )
            return
        self._merged(number, layer, new, group, members, outs, solved)

    def _merged(
        self,
        number: int,
        layer: Layer,
        new: int,
        group: int,
        members: tuple[int, ...],
        outs: list[tuple[Counted, Piece]],
        solved: Mapping[str, int],
    ) -> None:
        if self.maker is None or not self.mixture.plain:
            raise MoetoolError(
                "these experts cannot be merged",
                file=self.mixture.source.folder,
                tensor=f"layer {number}",
                expected="gate, up and down in floating point",
                hint="quantized experts can be pruned, not merged: dequantize the model first",
            )
        cluster = self._cluster(number, layer, new, members, group)
        wanted = {c.role: out for c, out in outs if c.role not in solved}
        for c, out in outs:
            if c.role in solved:
                self.build.copy(
                    Piece(solved_name(number, group, c.role), out.shape, 0, solved[c.role]), out
                )
        self.maker(self.build, cluster, wanted)

    def _cluster(
        self, number: int, layer: Layer, new: int, members: tuple[int, ...], group: int
    ) -> Cluster:
        lie = self.mixture.orientation(number)
        return Cluster(
            number,
            new,
            members,
            layer.weight(group),
            tuple(self.mixture.pieces(number, e) for e in members),
            {"transposed": lie["transposed"], "interleaved": lie["interleaved"]},
        )

    def _outputs(
        self, number: int, lead: int, new: int, stacks: Mapping[str, Target]
    ) -> tuple[list[tuple[Counted, Piece]], dict[str, dict[int, Counted]]]:
        """(tensor of the lead, where the new expert's part goes) for each of an expert's tensors,
        and role -> expert -> tensor.
        """
        kinds: dict[str, dict[int, Counted]] = {}
        outs = []
        for c in self.mixture.by_layer[number]:
            if c.kind != "expert":
                continue
            if c.expert is not None:
                kinds.setdefault(c.role, {})[c.expert] = c
            if c.expert is None:
                slab = c.slab(0)
                outs.append((c, Piece(stacks[c.stored.name].name, slab.shape, new * slab.count)))
            elif c.expert == lead:
                outs.append(
                    (c, whole(self.build.target(c.named(new), c.stored.dtype, c.stored.shape)))
                )
        return outs, kinds

    def _side(self, c: Counted, layer: Layer, slots: Sequence[int | None]) -> None:
        """Router rows, biases and scales: one entry for each expert of the output, zero_experts
        experts last.
        """
        experts, zero_experts = (
            self.mixture.experts,
            c.stored.shape[-1 if c.flat else 0] // (1 if c.flat else c.rows) - self.mixture.experts,
        )
        target = self.build.target(
            c.stored.name, c.stored.dtype, c.shape(len(slots) + zero_experts)
        )
        size = c.slab(0).count
        for new, group in enumerate(slots):
            out = Piece(target.name, c.slab(0).shape, new * size)
            if group is None and self.layout == "zeroed":
                self.build.copy(c.slab(new), out)
            elif group is None:
                never = c.role == "router.bias"
                self.build.task(
                    "fill", (), (out,), value=NEVER
                ) if never else self.build.tasks.append(_zeros(out))
            else:
                self._entry(c, layer, group, out)
        for extra in range(zero_experts):
            self.build.copy(
                c.slab(experts + extra),
                Piece(target.name, c.slab(0).shape, (len(slots) + extra) * size),
            )

    def _entry(self, c: Counted, layer: Layer, group: int, out: Piece) -> None:
        """A cluster's router row (or bias): its lead's, the weighted mean of its members', or for
        a bias in the logits their log-sum.
        """
        members = layer.groups[group]
        if len(members) == 1 or self.router == "centroid" or c.stored.dtype not in FLOATS:
            self.build.copy(c.slab(members[0]), out)
            return
        pieces, weights = [c.slab(e) for e in members], list(layer.weight(group))
        self.build.task("combine", pieces, (out,), weights=weights)
        if self.router == "logsumexp" and c.role == "router.bias":
            mean = self.build.tasks.pop()
            self.build.task(
                "affine_sum", mean.inputs, mean.outputs, weights=weights, shift=log(len(members))
            )

    def _ids(self, c: Counted, number: int, layer: Layer) -> None:
        """A table of expert ids by token (DeepSeek-V4): ids of experts that went become their
        nearest by router row.
        """
        key = f"ids.{number}"
        to = layer.map(self.mixture.experts)
        near = self._nearest(number, layer) if None in to else {}
        self.tables[key] = [new if new is not None else near[old] for old, new in enumerate(to)]
        self.build.task(
            "reindex",
            (whole(c.stored),),
            (whole(self.build.target(c.stored.name, c.stored.dtype, c.stored.shape)),),
            order=key,
            experts=layer.count,
        )

    def _nearest(self, number: int, layer: Layer) -> dict[int, int]:
        import numpy as np

        rows = router_rows(self.mixture, number)
        leads = rows[layer.leads]
        return {e: int(np.argmin(((leads - row) ** 2).sum(1))) for e, row in enumerate(rows)}


def _zeros(out: Piece) -> Any:
    from moetool.surgery.spec import Task

    return Task("zeros", (), (out,))


def router_rows(mixture: Mixture, layer: int) -> Any:
    """Router rows of a layer's experts as float64 [experts, hidden], read without torch.
    MoetoolError where there is no plain router.
    """
    router = mixture.side(layer, "router")
    if router is None or router.stored.dtype not in FLOATS or len(router.stored.shape) != 2:
        raise MoetoolError(
            f"{mixture.layout.model_type} has no router with one row an expert",
            file=mixture.source.folder,
            tensor=f"layer {layer}",
            hint="this family cannot be cut yet",
        )
    rows = mixture.source.numbers(whole(router.stored))
    return rows[: mixture.experts]
