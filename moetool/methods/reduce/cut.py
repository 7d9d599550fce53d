"""The plan that gives a model fewer experts: kept experts move byte for byte, others are computed,
and every tensor that counts experts is cut alike: router rows, selection biases, per-expert scales,
id tables, MTP layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import log
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder
from moetool.methods.reduce import router_rows, uneven
from moetool.methods.reduce.beside import solved_name
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.writing import Cluster, Maker, Writing
from moetool.surgery import groups, ragged, reform, shim
from moetool.surgery.counted import Counted
from moetool.surgery.experts import strays
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import FLOATS, Piece, Target, Task, whole

NEVER = -1e30  # a selection bias that no score overcomes


class Out(NamedTuple):
    """A tensor of the lead, and where the new expert's part goes."""

    tensor: Counted
    piece: Piece


class Cutter:
    """Builds the plan. `how`: how layers with other numbers of experts are written (ragged and
    ghost are uniform where all hold as many: a stock class does); `router`: which row a new expert
    gets (centroid, mean, logsumexp); `maker` plans experts that are no copies.
    """

    def __init__(self, writing: Writing, how: str, router: str, maker: Maker | None) -> None:
        self.mixture, self.decided, self.extra = writing.mixture, writing.decided, writing.extra
        alike = len({layer.count for layer in writing.decided.layers.values()}) == 1
        self.uneven = "uniform" if how in ("ragged", "ghost") and alike else how
        self.writing, self.router, self.maker = writing, router, maker
        self.build = Builder()
        self.tables: dict[str, list[int]] = {}
        self.uniform = self._uniform()
        self._solved: dict[str, int] = {}  # name of a solved tensor -> its source
        for number, source in enumerate(self.extra, 1):
            self._solved |= dict.fromkeys(source.tensors, number)

    def plan(self, form: str) -> Plan:
        """Every source tensor is used, cut, or refused; `form` is one of reform.FORMS."""
        self._refuse_strays()
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
        plan = reform.plan(
            [source, *self.extra],
            Outputs(config, self.build.targets, self.build.tasks, self._dropped()),
            max_shard=self.writing.settings.max_shard,
            tables={**self.tables, **self.writing.tables},
            form=form,
        )
        return plan

    def _refuse_strays(self) -> None:
        lost = next(strays(self.mixture), None)
        if lost:
            raise MoetoolError(
                "a tensor speaks of experts but its family does not know it",
                file=self.mixture.source.folder,
                tensor=lost,
                hint="it cannot be cut, and is not left behind in silence: remove it, or report the family",
            )

    def _dropped(self) -> dict[str, str]:
        """Tensors of experts that went, and stacks that were solved anew, by name."""
        pieces = chain.from_iterable(task.inputs for task in self.build.tasks)
        used = {p.name for p in pieces if p.source == 0}
        return {
            n: "every expert's matrix was solved anew"
            if c.expert is None
            else f"expert {c.expert} of layer {c.layer} was removed"
            for n, c in sorted(self.mixture.counted.items())
            if (c.expert is not None or c.kind == "expert") and n not in used
        }

    def _uniform(self) -> int:
        """The number of experts that the config will say."""
        counts: set[int] = {layer.count for layer in self.decided.layers.values()}
        if self.uneven == "zeroed":
            return self.mixture.experts
        if len(counts) > 1 and self.uneven == "uniform":
            raise UsageError(
                "layers would keep different numbers of experts",
                expected="one number (--uneven uniform)",
                found=sorted(counts),
                hint="--uneven ragged (small, and loads with moetool installed), ghost (exact where the router has a selection bias), or zeroed (loads everywhere, saves nothing)",
            )
        return max(counts)

    def _config(self) -> JsonObject:
        changed = self.mixture.fields(self.uniform)
        if self.uneven != "ragged":
            return self.mixture.config_with(changed)
        return self._ragged(changed)

    def _ragged(self, changed: JsonObject) -> JsonObject:
        """A config of moetool's own type: no stock class has layers of other counts."""
        mixture = self.mixture
        if why := mixture.text_model.must_be_alike():
            raise MoetoolError(
                why,
                file=mixture.source.folder,
                expected="a model whose layers are alike but for their experts",
                hint="--uneven zeroed of prune and merge loads everywhere; --layers all of extend",
            )
        counts = {n: self.decided.layers[n].count for n in mixture.layers}
        own = ragged.fields(counts, self.uniform, mixture.layout.fields["experts"])
        config = groups.ragged_config(mixture.config_with(changed | own))
        return config | {"auto_map": dict(shim.AUTO_MAP)}

    def _layer(self, number: int) -> None:
        decision = self.decided.layers[number]
        tensors = self.mixture.by_layer[number]
        slots = self._slots(number, decision)
        stacks = {
            c.stored.name: self.build.target(c.stored.name, c.stored.dtype, c.shape(len(slots)))
            for c in tensors
            if c.kind == "expert" and c.expert is None
        }
        for new, group in enumerate(slots):
            self._expert(number, new, group, stacks)
        for c in tensors:
            if c.kind == "expert" and c.expert is not None and c.expert >= self.mixture.experts:
                self._zero_expert(c, len(slots))
            elif c.kind == "router":
                self._side(c, decision, slots)
            elif c.kind == "ids":
                self._ids(c, number, decision)

    def _zero_expert(self, c: Counted, experts: int) -> None:
        """LongCat writes gate and up for zero experts."""
        assert c.expert is not None
        name = c.named(c.expert - self.mixture.experts + experts)
        self.build.copy(
            whole(c.stored), whole(self.build.target(name, c.stored.dtype, c.stored.shape))
        )

    def _slots(self, number: int, decision: Decision) -> list[int | None]:
        """For each expert of the output the group it comes from; None for one that is only there
        to be counted.
        """
        if self.uneven == "zeroed":
            to = decision.map(self.mixture.experts)
            return [
                to[e] if to[e] is not None and decision.groups[to[e] or 0][0] == e else None
                for e in range(self.mixture.experts)
            ]
        missing = self.uniform - decision.count if self.uneven == "ghost" else 0
        if missing:
            uneven.check_ghost(self.mixture, number)
        return [*range(decision.count), *[None] * missing]

    def _expert(
        self, number: int, new: int, group: int | None, stacks: Mapping[str, Target]
    ) -> None:
        """One expert of the output: copied, made, taken from what was solved, or zero."""
        decision = self.decided.layers[number]
        if group is None:  # it takes the shapes of the first
            for out in self._outputs(number, decision.leads[0], new, stacks):
                self.build.tasks.append(Task("zeros", (), (out.piece,)))
            return
        members = decision.groups[group]
        outs = self._outputs(number, members[0], new, stacks)
        solved = self._solved_for(number, group, outs)
        if self.maker is not None and self.maker.makes(decision, members):
            cluster = self._cluster(number, new, group, solved)
            self.maker.make(self.build, cluster, {c.role: piece for c, piece in outs})
            return
        if len(members) > 1:
            raise MoetoolError(
                "these experts cannot be merged",
                file=self.mixture.source.folder,
                tensor=f"layer {number}",
                expected="gate, up and down in floating point",
                hint="quantized experts can be pruned, not merged: dequantize the model first",
            )
        for c, piece in outs:
            self.build.copy(solved.get(c.role, c.slab(members[0])), piece)

    def _solved_for(self, number: int, group: int, outs: Sequence[Out]) -> dict[str, Piece]:
        """Parts of a new expert that deciding solved for, by role."""
        solved = {}
        for c, piece in outs:
            name = solved_name(number, group, c.role)
            if name in self._solved:
                solved[c.role] = Piece(name, piece.shape, 0, self._solved[name])
        return solved

    def _cluster(self, number: int, new: int, group: int, solved: Mapping[str, Piece]) -> Cluster:
        decision, lie = self.decided.layers[number], self.mixture.orientation(number)
        members = decision.groups[group]
        return Cluster(
            number,
            new,
            members,
            decision.weight(group),
            tuple(self.mixture.pieces(number, e) for e in members),
            {"transposed": lie["transposed"], "interleaved": lie["interleaved"]},
            solved,
        )

    def _outputs(self, number: int, lead: int, new: int, stacks: Mapping[str, Target]) -> list[Out]:
        """Each of an expert's tensors: the lead's own, or its slab of a stack."""
        outs = []
        for c in self.mixture.by_layer[number]:
            if c.kind != "expert":
                continue
            if c.expert is None:
                slab = c.slab(0)
                piece = Piece(stacks[c.stored.name].name, slab.shape, new * slab.count)
                outs.append(Out(c, piece))
            elif c.expert == lead:
                target = self.build.target(c.named(new), c.stored.dtype, c.stored.shape)
                outs.append(Out(c, whole(target)))
        return outs

    def _side(self, c: Counted, decision: Decision, slots: Sequence[int | None]) -> None:
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
            if group is None and self.uneven == "zeroed":
                self.build.copy(c.slab(new), out)
            elif group is None:
                never = c.role == "router.bias"
                self.build.task(
                    "fill", (), (out,), value=NEVER
                ) if never else self.build.tasks.append(Task("zeros", (), (out,)))
            else:
                self._entry(c, decision, group, out)
        for extra in range(zero_experts):
            self.build.copy(
                c.slab(experts + extra),
                Piece(target.name, c.slab(0).shape, (len(slots) + extra) * size),
            )

    def _entry(self, c: Counted, decision: Decision, group: int, out: Piece) -> None:
        """A cluster's router row (or bias): its lead's, the weighted mean of its members', or for
        a bias in the logits their log-sum.
        """
        members = decision.groups[group]
        if len(members) == 1 or self.router == "centroid" or c.stored.dtype not in FLOATS:
            self.build.copy(c.slab(members[0]), out)
            return
        pieces, weights = [c.slab(e) for e in members], list(decision.weight(group))
        self.build.task("combine", pieces, (out,), weights=weights)
        if self.router == "logsumexp" and c.role == "router.bias":
            mean = self.build.tasks.pop()
            self.build.task(
                "affine_sum", mean.inputs, mean.outputs, weights=weights, shift=log(len(members))
            )

    def _ids(self, c: Counted, number: int, decision: Decision) -> None:
        """A table of expert ids by token (DeepSeek-V4): ids of experts that went become their
        nearest by router row.
        """
        key = f"ids.{number}"
        to = decision.map(self.mixture.experts)
        near = self._nearest(number, decision) if None in to else {}
        self.tables[key] = [new if new is not None else near[old] for old, new in enumerate(to)]
        self.build.task(
            "reindex",
            (whole(c.stored),),
            (whole(self.build.target(c.stored.name, c.stored.dtype, c.stored.shape)),),
            order=key,
            experts=decision.count,
        )

    def _nearest(self, number: int, decision: Decision) -> dict[int, int]:
        import numpy as np

        rows = router_rows.read(self.mixture, number)
        leads = rows[decision.leads]
        return {e: int(np.argmin(((leads - row) ** 2).sum(1))) for e, row in enumerate(rows)}
