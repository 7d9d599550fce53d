"""The loop that solves: it shows every linear of a layer with its own inputs, later layers see what
was changed, and a run that ended early goes on and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from forward.test_walk import SHAPES, apart, batches
from safetensors.torch import load_file, save_file

from moetool.errors import MoetoolError, Stopped
from moetool.forward.block import Block
from moetool.forward.linears import Grams, Linear
from moetool.forward.solve import Solved, Work, place, solve
from moetool.forward.walk import Budget, Walk
from moetool.surgery.checkpoint import Checkpoint

FAMILIES = {  # linears of all four layers: attention, dense FFN, shared expert, routed experts
    "llama": 4 * (4 + 3),
    "qwen3_moe": 4 * 4 + 3 + 3 * 8 * 3,
    "mixtral": 4 * (4 + 8 * 3),
    "deepseek_v3": 4 * 5 + 3 + 3 * (3 + 8 * 3),
    "gpt_oss": 4 * (4 + 8 * 2),
}
Key = tuple[int, int | None, str]  # layer, expert, role or name


class Kept(Grams):
    """Grams of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.all: dict[Key, torch.Tensor] = {}
        self.linears: list[Linear] = []

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        super().begin(layer, linears)
        self.linears += linears

    def end(self, layer: int, block: Block | None) -> Mapping[str, torch.Tensor]:
        for linear in self.linears:
            if linear.layer == layer and self.tokens(linear.key):
                self.all[key(linear)] = self.gram(linear.key).clone()
        return super().end(layer, block)


def key(linear: Linear) -> Key:
    if linear.expert is None:
        return linear.layer, None, linear.piece.name
    return linear.layer, linear.expert, linear.role


def reference(model: Any, text: Any) -> dict[Key, torch.Tensor]:
    """X^T X of every linear, by forward hooks on the whole stock model in float64."""
    model.set_experts_implementation("eager")  # the others compute in float32 at most
    found: dict[Key, torch.Tensor] = {}
    now: list[np.ndarray] = []

    def add(at: Key, x: torch.Tensor) -> None:
        found[at] = found.get(at, torch.zeros(())) + x.T @ x

    def linear(name: str, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])[torch.from_numpy(now[0])]
            add((layer, None, f"{name}.weight"), x)

        return hook

    def experts(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x, index, *_ = (*args, *kwargs.values())
            x = x.reshape(-1, x.shape[-1])
            real = torch.from_numpy(now[0])[:, None]
            for e in range(module.down_proj.shape[0]):
                mine = x[((index.reshape(len(x), -1) == e) & real).any(1)]
                if len(mine):
                    roles = ("gate_up",) if hasattr(module, "alpha") else ("gate", "up")
                    for role in roles:
                        add((layer, e, role), mine)
                    add((layer, e, "down"), middle(module, mine, e))

        return hook

    for name, module in model.named_modules():
        parts = name.split(".")
        if "layers" not in parts[:-1]:
            continue
        layer = int(parts[parts.index("layers") + 1])
        if isinstance(module, torch.nn.Linear) and parts[-1] not in ("gate", "router"):
            module.register_forward_pre_hook(linear(name, layer))
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(experts(layer), with_kwargs=True)
    for batch in text.batches:
        now[:] = [batch.valid]
        with torch.no_grad():
            model(input_ids=torch.from_numpy(batch.ids))
    return found


def middle(module: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What down_proj of an expert sees, from the stock module's own weights."""
    if hasattr(module, "alpha"):  # gpt-oss: transposed, gate and up in turn
        mixed = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = mixed[:, 0::2].clamp(max=module.limit), mixed[:, 1::2]
        up = up.clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
    return module.act_fn(gate) * up


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_shown_its_inputs(family: str, models: Callable[..., Path]) -> None:
    folder, text = models(family), batches(*SHAPES)
    seen = Kept()
    Walk(Checkpoint.open(folder), text, Budget()).run(watch=seen)
    expected = reference(tiny.load(folder).double(), text)
    assert len(seen.linears) == FAMILIES[family]
    assert len({linear.key for linear in seen.linears}) == FAMILIES[family]
    assert seen.all.keys() == expected.keys()
    for at, gram in expected.items():
        assert float((seen.all[at] - gram).abs().max() / gram.abs().max()) < 1e-5, at


@pytest.mark.parametrize("gates", [1, 2])
def test_tokens_count_by_their_gate_weight(gates: int, models: Callable[..., Path]) -> None:
    """With one expert a token and a routing scale of 2 every gate weight is 2."""
    options = {"num_experts_per_tok": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0}
    source = Checkpoint.open(models("deepseek_v3", **options))
    plain, weighed = Kept(), Kept()
    weighed.gates = gates
    for watch in (plain, weighed):
        Walk(source, batches((2, 24)), Budget()).run(watch=watch)
    assert plain.all.keys() == weighed.all.keys()
    routed = 0
    for at, gram in plain.all.items():
        factor = 1 if at[1] is None else 2**gates
        routed += at[1] is not None
        apart = (weighed.all[at] - factor * gram).abs().max() / gram.abs().max()
        assert float(apart) < 1e-5, at
    assert routed > 6


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_file(family: str, models: Callable[..., Path]) -> None:
    """[out, in], whichever way round they lie."""
    seen = Kept()
    folder = models(family)
    weights: dict[str, torch.Tensor] = {}
    begin = seen.begin

    def read(layer: int, linears: Sequence[Linear]) -> None:
        weights.update({linear.key: linear.weight for linear in linears})
        begin(layer, linears)

    seen.begin = read  # type: ignore[method-assign]
    Walk(Checkpoint.open(folder), batches((2, 24)), Budget()).run(watch=seen)
    stored = load_file(folder / "model.safetensors")
    for linear in seen.linears:
        start = linear.piece.offset
        own = stored[linear.piece.name].reshape(-1)[start : start + linear.piece.count]
        own = own.view(linear.piece.shape).float()
        assert torch.equal(weights[linear.key], own.T if linear.turned else own)
        assert weights[linear.key].shape == linear.shape


def changed(linear: Linear) -> torch.Tensor:
    """Another weight for a linear, the same in every run."""
    dice = np.random.default_rng(sum(linear.key.encode()) + linear.piece.offset)
    noise = torch.from_numpy(dice.standard_normal(linear.shape)).float()
    return linear.weight * 0.9 + 0.01 * noise


class Changing:
    """A solver that gives every linear another weight."""

    linears, look, changes, again, gates = True, None, True, False, 0

    def __init__(self) -> None:
        self.now: list[Linear] = []
        self.made: list[tuple[Linear, torch.Tensor]] = []
        self.tokens = 0

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        self.now, self.tokens = list(linears), 0

    def inputs(self, linear: Linear, x: torch.Tensor) -> None:
        self.tokens += len(x)

    def end(self, layer: int, block: Block | None) -> Mapping[str, torch.Tensor]:
        made = {linear.key: changed(linear) for linear in self.now}
        self.made += [(linear, made[linear.key]) for linear in self.now]
        return made

    def solve(self, layer: int, block: Block | None) -> Solved:
        made = self.end(layer, block)
        return Solved({"tokens": self.tokens}, made, made)


def written(folder: Path, out: Path, made: Sequence[tuple[Linear, torch.Tensor]]) -> Path:
    """The model with the changed weights in its file."""
    tensors = load_file(folder / "model.safetensors")
    for linear, new in made:
        flat = tensors[linear.piece.name].view(-1)
        stop = linear.piece.offset + linear.piece.count
        flat[linear.piece.offset : stop] = (new.T if linear.turned else new).reshape(-1)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_later_layers_see_what_was_changed(
    family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Layer by layer, it is the stock model with those weights: nothing is left out."""
    folder, solver = models(family), Changing()
    walk = Walk(Checkpoint.open(folder), batches(*SHAPES), Budget(widened=True))
    walk.run(watch=solver)
    assert len(solver.made) == FAMILIES[family]
    model = tiny.load(written(folder, tmp_path / "changed", solver.made))
    assert apart(walk, model) < 2e-6
    assert apart(walk, tiny.load(folder)) > 1e-3


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "walk.json"}


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_it_goes_on_after_every_layer(
    family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Ended before or after any layer was kept, the second run ends with the same bytes."""
    source, text = Checkpoint.open(models(family)), batches(*SHAPES)
    whole = solve(source, text, Work(tmp_path / "whole", "seal"), Changing())
    assert sorted(whole.notes) == [0, 1, 2, 3] and whole.peak > 0
    for at in range(4):
        for place_ in ("before", "after"):
            work, solver = Work(tmp_path / f"{place_}{at}", "seal"), Changing()
            real = solver.solve

            def die(
                layer: int, block: Any, real: Any = real, at: int = at, place_: str = place_
            ) -> Solved:
                if layer == at and place_ == "before":
                    raise KeyboardInterrupt
                if layer == at + 1 and place_ == "after":
                    raise KeyboardInterrupt
                return real(layer, block)

            solver.solve = die  # type: ignore[method-assign]
            if (at, place_) != (3, "after"):
                with pytest.raises(KeyboardInterrupt):
                    solve(source, text, work, solver)
            again = solve(source, text, work, Changing())
            assert again == whole and files(work.folder) == files(tmp_path / "whole")


class Twice(Changing):
    """It changes attention first, and looks at the rest with that in place."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []
        self.seen: dict[tuple[int, int, str], torch.Tensor] = {}

    def begin(self, layer: int, linears: Sequence[Linear]) -> None:
        super().begin(layer, linears)
        self.begun.append(layer)

    def inputs(self, linear: Linear, x: torch.Tensor) -> None:
        self.seen.setdefault((linear.layer, self.begun.count(linear.layer), linear.key), x.clone())

    def solve(self, layer: int, block: Block | None) -> Solved:
        first = self.begun.count(layer) == 1
        now = [lin for lin in self.now if ("attn" in lin.key) is first]
        made = {lin.key: changed(lin) for lin in now}
        self.made += [(lin, made[lin.key]) for lin in now]
        return Solved(weights=made, again=first)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_layer_is_shown_again(family: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """What a layer was given the first time is in place the second time, and afterwards."""
    folder, text, solver = models(family), batches(*SHAPES), Twice()
    source = Checkpoint.open(folder)
    done = solve(source, text, Work(tmp_path / "w", "seal"), solver)
    assert sorted(done.notes) == [0, 1, 2, 3] and solver.begun == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(solver.made) == FAMILIES[family]
    attention = [(lin, new) for lin, new in solver.made if lin.layer == 0 and "attn" in lin.key]
    once = Twice()
    walk = Walk(Checkpoint.open(written(folder, tmp_path / "a", attention)), text, Budget())
    walk.run(watch=once)
    key = "model.layers.0.mlp.gate_proj.weight"
    assert torch.allclose(solver.seen[0, 2, key], once.seen[0, 1, key], atol=1e-5)
    assert not torch.allclose(solver.seen[0, 1, key], once.seen[0, 1, key], atol=1e-3)


def test_it_stops_and_another_seal_begins_anew(models: Callable[..., Path], tmp_path: Path) -> None:
    source, text, stop = Checkpoint.open(models("llama")), batches(*SHAPES), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        solve(source, text, Work(tmp_path / "w", "a", stop=stop), Changing())
    solve(source, text, Work(tmp_path / "w", "a"), Changing())
    before = place(tmp_path / "w", 0).stat().st_mtime_ns
    solve(source, text, Work(tmp_path / "w", "a"), Changing())
    assert place(tmp_path / "w", 0).stat().st_mtime_ns == before
    solve(source, text, Work(tmp_path / "w", "b"), Changing())
    assert place(tmp_path / "w", 0).stat().st_mtime_ns != before


def test_damaged_tensors_are_found(models: Callable[..., Path], tmp_path: Path) -> None:
    source, text = Checkpoint.open(models("llama")), batches(*SHAPES)
    solve(source, text, Work(tmp_path / "w", "a"), Changing())
    note = json.loads((tmp_path / "w" / "note-00002.json").read_text())
    assert len(note["sha256"]) == 64 and note["note"]["tokens"] > 0
    with place(tmp_path / "w", 2).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(MoetoolError, match="damaged") as found:
        solve(source, text, Work(tmp_path / "w", "a"), Changing())
    assert "layer 2" in str(found.value) and found.value.hint


SPOILED = {
    "gone": None,
    "cut": b'{"note": {"tok',
    "no text": b"\xff\xfe",
    "no object": b"[]",
    "no seal": b'{"note": {}}',
    "another note": b'{"note": [], "sha256": ""}',
}


@pytest.mark.parametrize("file", ["note-00002.json", "done.json"])
@pytest.mark.parametrize("spoiled", SPOILED)
def test_damaged_notes_are_found(
    file: str, spoiled: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """A note that is gone, cut or another's is said with its file, not a bug of moetool."""
    source, text, data = Checkpoint.open(models("llama")), batches((2, 24)), SPOILED[spoiled]
    whole = solve(source, text, Work(tmp_path / "w", "a"), Changing())
    (tmp_path / "w" / file).unlink()
    if data is not None:
        (tmp_path / "w" / file).write_bytes(data)
    elif file == "done.json":  # killed before the end: the last layers are solved again
        assert solve(source, text, Work(tmp_path / "w", "a"), Changing()) == whole
        return
    with pytest.raises(MoetoolError, match="damaged") as found:
        solve(source, text, Work(tmp_path / "w", "a"), Changing())
    assert found.value.where["file"].endswith(file) and "remove" in found.value.hint
    shutil.rmtree(tmp_path / "w")
    assert solve(source, text, Work(tmp_path / "w", "a"), Changing()) == whole


def test_a_linear_without_a_tensor_is_refused(models: Callable[..., Path]) -> None:
    """It must not be left out without a word: nobody would solve for it."""
    walk, lost = Walk(Checkpoint.open(models("llama")), batches((2, 24)), Budget()), "q_proj"
    del walk.shell.disk[f"model.layers.1.self_attn.{lost}.weight"]
    with pytest.raises(MoetoolError, match="no tensor of its own") as found:
        walk.run(watch=Kept())
    assert lost in found.value.where["tensor"] and found.value.hint and found.value.where["file"]
