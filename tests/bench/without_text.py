"""What calibration without text is worth, and a share of it beside text: `python
tests/bench/without_text.py TESTBED [--left-out] [--ridge 1] [--ratio 0.5]`.

TESTBED is a folder with a trained MoE (qwen3moe-16x4/) and text (text/calibration.jsonl with a
`domain`, text/val.*.jsonl). Experts go by REAP and down_proj is refitted, layer by layer, as
`moetool prune` does it, in memory; KL in nats a token. Without options: sources of ids, judged on
the val files. --left-out: text with shares of own or random ids, fitted on all domains but one and
judged on documents of calibration.jsonl, of that one (`out`) and of the others (`in`): for choosing.
Prints tables; a command, not a test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetool.forward import block as blocks
from moetool.forward import drawn, own, stock
from moetool.forward.own import Running
from moetool.kernels import draw, solve
from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce.view import Eye, View
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

LENGTH, CALIBRATION, JUDGED = 256, 8192, 1024  # tokens of a sequence, of a fit, of a domain


class Bed:
    """The testbed in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, Checkpoint.open(folder / "qwen3moe-16x4")
        self.mixture = Mixture.of(self.source)
        self.model = stock.load(self.source)[0].eval()
        self.tokenizer = stock.tokenizer(folder / "qwen3moe-16x4")
        self.blocks = [
            blocks.read(self.mixture, n, device="cpu", widen=True) for n in self.mixture.layers
        ]
        self.ids = drawn.of(self.source.folder, self.source.config, 8192)

    def rows(self, documents: Iterable[str], tokens: int) -> np.ndarray:
        """Sequences [n, LENGTH] that hold `tokens`, evenly spaced over all documents, packed."""
        flat: list[int] = []
        for text in documents:
            flat += [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
        count, wanted = len(flat) // LENGTH, tokens // LENGTH
        whole = np.array(flat[: count * LENGTH]).reshape(count, LENGTH)
        return whole[[(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]]

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for line in (self.folder / "text" / "calibration.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[row["domain"]].append(row["text"])
        return found

    def fit(self, domains: Sequence[str], tokens: int) -> np.ndarray:
        """Of every second document."""
        parts = np.array_split(np.arange(tokens // LENGTH), len(domains))
        rows = [
            self.rows(self.domains[d][0::2], len(part) * LENGTH)
            for d, part in zip(domains, parts, strict=True)
        ]
        return np.concatenate(rows)

    def judged(self, domain: str) -> np.ndarray:
        """Of the others."""
        return self.rows(self.domains[domain][1::2], JUDGED)

    def val(self) -> dict[str, np.ndarray]:
        files = sorted((self.folder / "text").glob("val.*.jsonl"))
        texts = {f.name: [json.loads(x)["text"] for x in f.read_text().splitlines()] for f in files}
        return {name.split(".")[1]: self.rows(found, JUDGED) for name, found in texts.items()}

    def drawn(self, kind: str, tokens: int) -> np.ndarray:
        """Ids of no text, [n, LENGTH]."""
        uniform = replace(self.ids, weight=np.ones(len(self.ids.ids)))
        wrote = own.of(self.source, self.ids, Running())
        maker = {"random": self.ids, "uniform": uniform, "own": wrote}[kind]
        return np.concatenate(list(maker.rows(tokens, LENGTH, 0))).reshape(-1, LENGTH)

    def attended(self, layer: Any, h: torch.Tensor) -> torch.Tensor:
        places = self.model.model.rotary_emb(h[:1], torch.arange(LENGTH)[None])
        parts = [
            layer.self_attn(
                hidden_states=layer.input_layernorm(part),
                position_embeddings=places,
                attention_mask=None,
                is_causal=True,
            )[0]
            for part in h.split(16)
        ]
        return h + torch.cat(parts)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model.lm_head(self.model.model.norm(h)), -1)

    @torch.no_grad()
    def before(self, ids: np.ndarray) -> torch.Tensor:
        """Log-probabilities of the whole model [n, LENGTH, vocab]."""
        parts = [self.model(torch.from_numpy(p)).logits for p in np.array_split(ids, len(ids))]
        return torch.log_softmax(torch.cat(parts), -1)


Keep = list[list[int]]  # experts that stay, by layer


def best(scores: Sequence[float], ratio: float) -> list[int]:
    count = len(scores) - int(len(scores) * ratio)
    return sorted(np.argsort(-np.array(scores), kind="stable")[:count].tolist())


def by_chance(bed: Bed, ratio: float, seed: int) -> Keep:
    experts, layers = bed.mixture.experts, bed.mixture.layers
    return [best(draw.uniform(experts, seed, f"prune/{n}").tolist(), ratio) for n in layers]


def by_router(bed: Bed, ratio: float) -> Keep:
    way = PruneWay.known()["router-distance"](None)
    count = bed.mixture.experts - int(bed.mixture.experts * ratio)
    return [way.keep(View(bed.mixture, n, Eye("", 0)), count) for n in bed.mixture.layers]


@torch.no_grad()
def by_reap(bed: Bed, ids: np.ndarray, ratio: float) -> Keep:
    """By what the whole model does on `ids`, as a profile shows it."""
    h, found = bed.model.model.embed_tokens(torch.from_numpy(ids)), []
    for block, layer in zip(bed.blocks, bed.model.model.layers, strict=True):
        h = bed.attended(layer, h)
        x = layer.post_attention_layernorm(h).flatten(0, 1)
        sums, counts = torch.zeros(block.experts.count), torch.zeros(block.experts.count)

        def seen(at: Any, sums: torch.Tensor = sums, counts: torch.Tensor = counts) -> None:
            sums[at.expert] += (at.out.norm(dim=-1) * at.weight).sum()
            counts[at.expert] += len(at.rows)

        h = h + block.routed(x, block.route(x), seen).view_as(h)
        found.append(best((sums / counts.clamp_min(1)).tolist(), ratio))
    return found


@torch.no_grad()
def reduced(bed: Bed, judged: np.ndarray, keep: Keep, fit: np.ndarray | None) -> torch.Tensor:
    """Log-probabilities of the reduced model on `judged`, refitted on `fit`."""
    ids = judged if fit is None else np.concatenate([judged, fit])
    h = bed.model.model.embed_tokens(torch.from_numpy(ids))
    for number, (block, layer) in enumerate(zip(bed.blocks, bed.model.model.layers, strict=True)):
        h = bed.attended(layer, h)
        x = layer.post_attention_layernorm(h).flatten(0, 1)
        new, mine = block.with_experts(keep[number]), x[judged.size :]
        if len(mine):
            target = block.routed(mine, block.route(mine))
            made = solve.refit(mine, new.route(mine), new.experts, new.law, target)
            new = replace(new, experts=replace(new.experts, down=made.down.bfloat16().float()))
        h = h + new.routed(x, new.route(x)).view_as(h)
    return bed.logits(h[: len(judged)])


def kl(before: torch.Tensor, after: torch.Tensor, places: slice) -> float:
    p, q = before[places], after[places]
    return float((p.exp() * (p - q)).sum(-1).mean())


def sources(bed: Bed, ratio: float) -> None:
    """Every source of ids, judged on val."""
    judged = bed.val()
    ids = np.concatenate(list(judged.values()))
    before, size = bed.before(ids), JUDGED // LENGTH
    fits = {k: bed.drawn(k, CALIBRATION) for k in ("uniform", "random", "own")}
    fits["text"] = bed.fit(list(bed.domains), CALIBRATION)
    rows: list[tuple[str, Keep, np.ndarray | None]] = [
        *((f"chance, seed {n}", by_chance(bed, ratio, n), None) for n in range(3)),
        ("router-distance", by_router(bed, ratio), None),
    ]
    for name, fit in fits.items():
        keep = by_reap(bed, fit, ratio)
        rows += [(f"{name}: reap", keep, None), (f"{name}: reap, refit", keep, fit)]
    print("| removed | calibration | KL | " + " | ".join(judged) + " | CPU s |")
    print("|---" * (len(judged) + 4) + "|")
    for name, keep, fit in rows:
        begun = time.process_time()
        after = reduced(bed, ids, keep, fit)
        each = [kl(before, after, slice(i * size, (i + 1) * size)) for i in range(len(judged))]
        cells = " | ".join(f"{one:.3f}" for one in each)
        spent = time.process_time() - begun
        print(f"| {ratio:.0%} | {name} | {np.mean(each):.4f} | {cells} | {spent:.0f} |", flush=True)


CASES = ((0.0, "own"), (0.1, "own"), (0.2, "own"), (0.4, "own"), (0.2, "random"))


def left_out(bed: Bed, ratio: float, cases: Sequence[tuple[float, str]] = CASES) -> None:
    """Shares of ids of no text, one domain left out in turn, judged on calibration documents."""
    judged = {d: bed.judged(d) for d in bed.domains}
    ids = np.concatenate(list(judged.values()))
    before, size = bed.before(ids), JUDGED // LENGTH
    places = {d: slice(i * size, (i + 1) * size) for i, d in enumerate(judged)}
    pool = {kind: bed.drawn(kind, CALIBRATION) for kind in ("own", "random")}
    print("| left out | " + " | ".join(f"{s:.0%} {k}: out / in" for s, k in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for left in judged:
        others, cells = [d for d in judged if d != left], []
        keep = by_reap(bed, bed.fit(others, CALIBRATION), ratio)
        for share, kind in cases:
            count = round(CALIBRATION * share) // LENGTH
            text = bed.fit(others, CALIBRATION - count * LENGTH)
            after = reduced(bed, ids, keep, np.concatenate([text, pool[kind][:count]]))
            inside = np.mean([kl(before, after, places[d]) for d in others])
            cells.append(f"{kl(before, after, places[left]):.3f} / {inside:.3f}")
        print(f"| {left} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("testbed", type=Path)
    told.add_argument("--left-out", action="store_true")
    told.add_argument("--ridge", type=float, default=solve.RIDGE)
    told.add_argument("--ratio", type=float, default=0.5)
    options = told.parse_args()
    solve.RIDGE = options.ridge
    torch.set_num_threads(1)
    bed = Bed(options.testbed)
    (left_out if options.left_out else sources)(bed, options.ratio)


if __name__ == "__main__":
    main()
