"""What forms of experts cost, in CPU time against the dense FFN in the same run.

    python tests/bench/forms.py [--rounds 15] [--model DIR | --places]

One FFN of SmolLM2's size (576 x 1536), float32, one thread: every case runs once in each round, and
the table shows the ratio of the least times. `--model` times a whole forward of that model with low-rank
experts in every layer against the model itself. `--places` times a linear changed at a few places
alone: its numbers added one by one, and spread out to a matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import moetool  # noqa: F401  (transformers learns of the model type)
from moetool.modeling.experts import sparse
from moetool.modeling.install import install
from moetool.surgery import groups
from moetool.surgery.groups import Group
from moetool.surgery.route import Route

HIDDEN, WIDTH = 576, 1536
LORA = {"rank": 16, "alpha": 32.0}
INT8 = {"activations": "int8"}
CASES: dict[str, tuple[Group, str]] = {
    "LoRA r16 E=8 top-1": (Group("lora", 8, (0,), params=LORA), "1.5 / 1.5"),
    "LoRA r16 E=8 top-2": (Group("lora", 8, (0,), params=LORA, route=Route(top_k=2)), "2.0 / -"),
    "LoRA r16 E=32 top-1": (Group("lora", 32, (0,), params=LORA), "1.8 / -"),
    "full E=8 top-1 instead": (Group("full", 8, (0,), base="gone"), ""),
    "full E=8 top-2 instead": (Group("full", 8, (0,), base="gone", route=Route(top_k=2)), ""),
    "kept + ternary E=8 top-1": (Group("ternary", 8, (0,), base="beside"), "2.6 / 3.5"),
    "kept + ternary E=32 top-1": (Group("ternary", 32, (0,), base="beside"), "6 / 5"),
    "the same E=8, int8": (Group("ternary", 8, (0,), base="beside", params=INT8), ""),
    "the same E=32, int8": (Group("ternary", 32, (0,), base="beside", params=INT8), ""),
    "kept + null E=8 top-1": (Group("null", 8, (0,), base="beside"), ""),
}


class Layers(torch.nn.Module):
    """As much of a Llama as `install` looks at."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        layer = torch.nn.Module()
        layer.mlp = mlp
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([layer])


def block(group: Group | None) -> torch.nn.Module:
    """An FFN, with a group or as it is, filled with small numbers."""
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDTH))
    if group is not None:
        install(Layers(mlp), (group,), "llama")
    for held in mlp.parameters():
        if held.dtype == torch.uint8:
            held.data.random_(0, 256)
        elif held.dim() > 1:
            held.data.normal_(std=0.02)
        else:
            held.data.fill_(0.01)
    return mlp.requires_grad_(False).eval()


def timed(runs: dict[str, Callable[[], Any]], rounds: int, repeat: int) -> dict[str, float]:
    """Least CPU seconds of each, in turn: what other processes add is left out."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(repeat):
                run()
            found[name].append((time.process_time() - start) / repeat)
    return {name: min(seconds[1:]) for name, seconds in found.items()}


def ffn(rounds: int) -> None:
    """The table of one FFN."""
    blocks = {"dense": block(None)} | {n: block(g) for n, (g, _) in CASES.items()}
    many, one = torch.randn(1, 512, HIDDEN), torch.randn(1, 1, HIDDEN)
    columns = []
    for x, repeat in ((many, 1), (one, 10)):
        runs = {n: (lambda b=b, x=x: b(x)) for n, b in blocks.items()}
        columns.append(timed(runs, rounds, repeat))
    print("| form | 512 tokens | 1 token | at most |\n|---|---|---|---|")
    dense = [c["dense"] for c in columns]
    print(f"| dense (ms) | {dense[0] * 1e3:.1f} | {dense[1] * 1e3:.2f} | |")
    for name, (_, bar) in CASES.items():
        first, second = (c[name] / c["dense"] for c in columns)
        print(f"| {name} | {first:.2f} | {second:.2f} | {bar} |")


def whole(folder: Path, rounds: int) -> None:
    """A whole forward, every layer with low-rank experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = tuple(range(model.config.num_hidden_layers))
    said = groups.config_of(model.config.to_dict(), (Group("lora", 8, layers, params=LORA),))
    from moetool.modeling.carrier import MoetoolConfig

    made = AutoModelForCausalLM.from_config(MoetoolConfig.from_dict(said), dtype=torch.float32)
    made.load_state_dict(model.state_dict(), strict=False)
    ids = torch.randint(10, 1000, (1, 512))
    apart = (made(ids).logits - model(ids).logits).abs().max() / model(ids).logits.abs().max()
    pair = {"dense": lambda: model(ids), "lora": lambda: made(ids)}
    seconds = timed(pair, rounds, 1)
    ratio = seconds["lora"] / seconds["dense"]
    print(f"| whole forward, 512 tokens, LoRA r16 E=8 top-1 | {ratio:.2f} | | 1.35 |")
    print(f"logits apart at birth: {apart:.1e} of the largest")


def places(rounds: int) -> None:
    """The two ways of a change at a few places, milliseconds for so many rows of input."""
    rows = (1, 8, 32, 128, 512)
    print(f"| places | {' | '.join(f'{n} rows' for n in rows)} |")
    print("|---" * (len(rows) + 1) + "|")
    for share in (32, 128, 512, 2048):
        linear = sparse.SparseLinear((WIDTH, HIDDEN), 1 / share)
        at = torch.randperm(WIDTH * HIDDEN)[: len(linear.delta_values)].sort().values
        linear.delta_rows.data[1:] = torch.bincount(at // HIDDEN, minlength=WIDTH).cumsum(0)
        linear.delta_columns.data = (at % HIDDEN).to(linear.delta_columns.dtype)
        linear.delta_rows.data[0] = 0
        linear.delta_values.data.normal_()
        print(f"| 1 in {share} |", " | ".join(both(linear, n, rounds) for n in rows), "|")


@torch.no_grad()
def both(linear: sparse.SparseLinear, rows: int, rounds: int) -> str:
    """One by one / spread, the one that is taken in bold."""
    x, base = torch.randn(rows, HIDDEN), torch.zeros(rows, WIDTH)

    def way(spread: bool) -> Callable[[], Any]:
        return lambda: linear.added(x, base, over=True, spread=spread)

    ways = {"one by one": way(False), "spread": way(True)}
    cells = [f"{seconds * 1e3:.2f}" for seconds in timed(ways, rounds, 5).values()]
    taken = int(linear.spreads(rows))
    cells[taken] = f"**{cells[taken]}**"
    return " / ".join(cells)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=15)
    asked.add_argument("--model", type=Path)
    asked.add_argument("--places", action="store_true")
    said = asked.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # as `generate` runs
    if said.places:
        places(said.rounds)
        return
    ffn(said.rounds)
    if said.model is not None:
        whole(said.model, min(said.rounds, 5))


if __name__ == "__main__":
    main()
