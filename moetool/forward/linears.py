"""Every linear of a decoder layer with its inputs: attention, dense FFN, shared expert, routed
experts. What solves for weights (GPTQ, AWQ, smoothing) looks through here, and knows no family.

Routers and the switch of a shared expert are left out: they decide, they do not carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from moetool.errors import MoetoolError
from moetool.forward.adapter import Shell
from moetool.forward.batches import Batch
from moetool.forward.block import Block
from moetool.kernels import form, moe
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import Piece, whole

Tensor = torch.Tensor
MATRICES = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix of a layer. `piece`: where it lies on disk, a slab where experts are stacked;
    `turned`: it lies there as [in, out]. `expert` and `role` are set for experts (the shared one
    has no number).
    """

    layer: int
    key: str  # its name on disk; for a slab `name@offset`, the element where it begins
    piece: Piece
    shape: tuple[int, int]  # [out, in]
    expert: int | None = None
    role: str = ""
    turned: bool = False
    _read: Callable[[], Tensor] = field(default=lambda: torch.empty(0), repr=False)

    @property
    def weight(self) -> Tensor:
        """[out, in], float32; rows in the order of the file. While the layer is in memory."""
        return self._read()


class Observer(Protocol):
    """Sees every linear of every layer at work, and may give some of them new weights (`changes`:
    whether it ever does). `again`, asked after `end`: the layer is to be shown once more, with the
    weights it was given. `gates`: the power of the gate weight that an expert's tokens count with
    (their inputs are shown multiplied by its root; 0: as they are).
    """

    changes: bool
    gates: int

    @property
    def again(self) -> bool: ...

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        """A layer begins."""
        ...

    def inputs(self, linear: Linear, x: Tensor) -> None:
        """Real tokens x [tokens, in] that a linear sees; for a routed expert those that were sent
        to it. Linears that see the same inputs are shown the same tensor, one after the other.
        """
        ...

    def end(self, layer: int, block: Block | None) -> Mapping[str, Tensor]:
        """New weights [out, in] by key, when all batches were seen. The layers above see what the
        layer makes of them.
        """
        ...


class Linears:
    """The linears of one layer while its weights are in memory."""

    def __init__(
        self, shell: Shell, layer: int, inside: str | None, mixture: Mixture | None
    ) -> None:
        self.layer, self.mixture, self.module = layer, mixture, shell.layers[layer]
        self.outside = self._modules(shell, inside)
        self.shared = self._shared() if inside is not None else {}
        self.experts = self._experts() if inside is not None else {}

    def __iter__(self) -> Iterator[Linear]:
        yield from self.outside.values()
        yield from self.shared.values()
        for roles in self.experts.values():
            yield from roles.values()

    def _modules(self, shell: Shell, inside: str | None) -> dict[str, Linear]:
        """Linear modules by their place in the layer, but for those of a MoE block."""
        found = {}
        for name, module in self.module.named_modules():
            if not isinstance(module, nn.Linear) or _within(name, inside):
                continue
            disk = _on_disk(shell, f"{shell.stack}.{self.layer}.{name}.weight")
            shape = (module.out_features, module.in_features)
            piece, read = whole(shell.source.tensor(disk)), partial(_weight, module)
            found[name] = Linear(self.layer, disk, piece, shape, _read=read)
        return found

    def _shared(self) -> dict[str, Linear]:
        """role -> linear of the always-on expert."""
        assert self.mixture is not None
        return {
            role: self._linear(whole(stored), None, role, False)
            for role, stored in self.mixture.shared(self.layer).items()
            if role in MATRICES
        }

    def _experts(self) -> dict[int, dict[str, Linear]]:
        """expert -> role -> linear."""
        mixture, layer = self.mixture, self.layer
        assert mixture is not None
        turned = bool(mixture.orientation(layer)["transposed"])
        made = {}
        for expert in range(mixture.count_in(layer)):
            pieces = mixture.pieces(layer, expert)
            made[expert] = {
                role: self._linear(pieces[role], expert, role, turned and "gate_up" in pieces)
                for role in MATRICES
                if role in pieces
            }
        return made

    def _linear(self, piece: Piece, expert: int | None, role: str, turned: bool) -> Linear:
        assert self.mixture is not None
        source = self.mixture.source

        def read() -> Tensor:
            matrix = source.matrix(piece).float()
            return matrix.T if turned else matrix

        rows, columns = piece.shape[-2:]
        shape = (columns, rows) if turned else (rows, columns)
        slab = piece.count != source.tensor(piece.name).elements
        key = f"{piece.name}@{piece.offset}" if slab else piece.name
        return Linear(self.layer, key, piece, shape, expert, role, turned, read)

    @contextmanager
    def watched(self, watch: Observer, now: Callable[[], Batch]) -> Iterator[None]:
        """While open, `watch` sees the inputs of the linears outside the MoE block."""
        real = _Real(now)

        def seen(linear: Linear, module: nn.Module, args: tuple[Any, ...]) -> None:
            watch.inputs(linear, real.tokens(args[0]))

        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(partial(seen, linear))
            for name, linear in self.outside.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def inside(self, watch: Observer, block: Block, x: Tensor) -> Callable[[moe.AtWork], None]:
        """Show the shared expert's inputs; returns what to call with each expert at work. x: real
        tokens [tokens, hidden].
        """
        if self.shared:
            shared = block.shared
            watch.inputs(self.shared["gate"], x)
            watch.inputs(self.shared["up"], x)
            gate, up = x @ shared["gate"].T, x @ shared["up"].T
            watch.inputs(self.shared["down"], moe.glu(block.experts.act, gate, up))

        def seen(at: moe.AtWork) -> None:
            if at.expert not in self.experts:  # a zero expert
                return
            roles, mine = self.experts[at.expert], x[at.rows]
            if block.law.score == "sigmoid-on-input":
                mine = mine * at.weight[:, None]
            between = at.h
            if watch.gates:
                by = at.weight[:, None] ** (watch.gates / 2)
                mine, between = mine * by, between * by
            for role, linear in roles.items():
                watch.inputs(linear, between if role == "down" else mine)

        return seen

    def put(self, weights: Mapping[str, Tensor], block: Block | None) -> Block | None:
        """The layer with these weights [out, in] by key; returns its new block."""
        for name, linear in self.outside.items():
            if linear.key in weights:
                own: Any = self.module.get_submodule(name)
                own.weight = nn.Parameter(weights[linear.key].float(), requires_grad=False)
        if block is None:
            return None
        shared = {
            r: weights[lin.key].to(block.router.device, torch.float32)
            for r, lin in self.shared.items()
            if lin.key in weights
        }
        for expert, roles in self.experts.items():
            if any(linear.key in weights for linear in roles.values()):
                self._put_expert(block, expert, weights)
        return replace(block, shared=block.shared | shared)

    def _put_expert(self, block: Block, expert: int, weights: Mapping[str, Tensor]) -> None:
        assert self.mixture is not None
        lie, parts = self.mixture.orientation(self.layer), {}
        for role, linear in self.experts[expert].items():
            new = weights.get(linear.key)
            matrix = linear.weight if new is None else new
            parts[role] = matrix.T if linear.turned else matrix
        made = form.canonical(parts, transposed=lie["transposed"], interleaved=lie["interleaved"])
        block.experts.gate_up[expert].copy_(made["gate_up"])
        block.experts.down[expert].copy_(made["down"])


class _Real:
    """Inputs without padding; the same tensor for all who see the same."""

    def __init__(self, now: Callable[[], Batch]) -> None:
        self.now = now
        self._last: tuple[Tensor, int] | None = None
        self._made = torch.empty(0)

    def tokens(self, x: Tensor) -> Tensor:
        """x [..., in] -> real tokens [tokens, in]."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            flat, batch = x.reshape(-1, x.shape[-1]), self.now()
            if batch.tokens < batch.ids.size:
                flat = flat[torch.from_numpy(batch.valid).to(flat.device)]
            self._last, self._made = (x, x._version), flat
        return self._made


def _within(name: str, inside: str | None) -> bool:
    return inside is not None and (name == inside or name.startswith(inside + "."))


def _on_disk(shell: Shell, parameter: str) -> str:
    """The name in the files of a linear's weight; MoetoolError where it has none of its own, for
    then nothing that is solved for it could be written.
    """
    if parameter not in shell.disk:
        raise MoetoolError(
            "a linear of the model is no tensor of its own in the files, so it cannot be solved for",
            file=shell.source.folder,
            tensor=parameter,
            expected="one tensor for each linear",
            found="none of this name, or one that transformers converts while it loads",
            hint="use a method that does not solve for the linears of a layer: `moetool methods list`",
        )
    return shell.disk[parameter]


def _weight(module: nn.Linear) -> Tensor:
    return module.weight.detach().float()


class Grams:
    """A Observer that sums X^T X of every linear's inputs: the Hessian of its squared error (GPTQ,
    arXiv 2210.17323). Linears that see the same inputs share one.
    """

    changes, again, gates = False, False, 0

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self._leads: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[Tensor, str] | None = None

    def gram(self, key: str) -> Tensor:
        """X^T X of a linear's inputs [in, in]; KeyError where no token came."""
        return self._sums[self._leads[key]]

    def lead(self, key: str) -> str:
        """The linear whose inputs stand for those of this one; itself where it saw none."""
        return self._leads.get(key, key)

    def tokens(self, key: str) -> int:
        """How many tokens a linear saw."""
        return self._tokens.get(self.lead(key), 0)

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        self._leads, self._sums, self._tokens, self._last = {}, {}, {}, None

    def inputs(self, linear: Linear, x: Tensor) -> None:
        if linear.key not in self._leads:
            same = self._last is not None and self._last[0] is x
            self._leads[linear.key] = self._last[1] if self._last and same else linear.key
        lead = self._leads[linear.key]
        self._last = (x, lead)
        if lead != linear.key:
            return
        wide = x.to(self.dtype)
        gram = wide.T @ wide
        self._sums[lead] = self._sums[lead].add_(gram) if lead in self._sums else gram
        self._tokens[lead] = self._tokens.get(lead, 0) + len(x)

    def end(self, layer: int, block: Block | None) -> Mapping[str, Tensor]:
        """No new weights."""
        self._last = None
        return {}
