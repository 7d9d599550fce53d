"""Looks at MoE layers at work, and sums up what each expert does (forward/stats.py says what)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moetool.forward.block import Block
from moetool.forward.stats import DENSE_BYTES, LayerStats, Wanted, save
from moetool.kernels import moe

Tensor = torch.Tensor


class Profiler:
    """Looks at every MoE layer and keeps `LayerStats`; with a folder, one file a layer, else in
    `layers`.
    """

    def __init__(
        self,
        wanted: Wanted,
        folder: Path | None = None,
        done: Callable[[LayerStats], None] | None = None,
    ) -> None:
        self.wanted, self.folder, self.done = wanted, folder, done
        self.layers: dict[int, LayerStats] = {}

    def begin(self, layer: int, block: Block, tokens: int) -> None:
        """Start a layer; `tokens` are all that will come."""
        e, hidden = block.experts.count, block.router.shape[1]
        width, everyone, files = (
            block.experts.down.shape[2],
            e + block.zero_experts,
            self.wanted.files,
        )
        self._layer, self._block, self._expected, self._seen = layer, block, tokens, 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self._sums: dict[str, Tensor] = {
            "count": zeros(files, everyone),
            "gate": zeros(files, everyone),
            "reap": zeros(files, e),
            "prob": zeros(everyone),
            "norm": zeros(e),
            "norm2": zeros(e),
            "out_sum": zeros(e, hidden),
            "out_sq": zeros(e, hidden),
            "max_in": zeros(e),
            "max_out": zeros(e),
            "easy": zeros(e),
            "in_sq": zeros(e, hidden),
            "mid_sq": zeros(e, width),
            "together": zeros(everyone, everyone),
            "stream": zeros(2),
        }
        if self.wanted.covariance:
            self._sums |= {"in_cov": zeros(hidden, hidden), "mid_cov": zeros(e, width, width)}
        self._sample: list[Tensor] = []

    def batch(self, file: int, x: Tensor, routing: moe.Routing) -> Callable[[moe.AtWork], None]:
        """Take note of a batch's routing; returns what to call with each expert at work."""
        sums, index = self._sums, routing.index
        everyone = sums["prob"].shape[0]
        flat = index.reshape(-1)
        sums["count"][file] += torch.bincount(flat, minlength=everyone).double().cpu()
        sums["gate"][file] += torch.bincount(
            flat, routing.weight.reshape(-1).double(), minlength=everyone
        ).cpu()
        sums["prob"] += routing.scores.sum(0, dtype=torch.float64).cpu()
        hot = torch.zeros(len(x), everyone, device=x.device).scatter_(1, index, 1.0)
        sums["together"] += (hot.T @ hot).double().cpu()
        if self.wanted.covariance:
            sums["in_cov"] += (x.T @ x).double().cpu()
        self._take(x)
        self._pending: list[tuple[Tensor, int, Tensor]] = []

        def seen(at: moe.AtWork) -> None:
            if at.expert < self._block.experts.count:
                self._expert(file, x, at)

        return seen

    def _expert(self, file: int, x: Tensor, at: moe.AtWork) -> None:
        sums, e = self._sums, at.expert
        squares = at.out * at.out
        norms = squares.sum(-1).sqrt()
        weighted = norms if self._block.law.score == "sigmoid-on-input" else norms * at.weight
        sums["reap"][file, e] += weighted.sum(dtype=torch.float64).cpu()
        sums["norm"][e] += norms.sum(dtype=torch.float64).cpu()
        sums["norm2"][e] += squares.sum(dtype=torch.float64).cpu()
        sums["out_sum"][e] += at.out.sum(0).double().cpu()
        sums["out_sq"][e] += squares.sum(0).double().cpu()
        sums["max_in"][e] = max(float(sums["max_in"][e]), float(at.h.abs().amax()))
        sums["max_out"][e] = max(float(sums["max_out"][e]), float(at.out.abs().amax()))
        mine = x[at.rows]
        sums["in_sq"][e] += (mine * mine).sum(0).double().cpu()
        sums["mid_sq"][e] += (at.h * at.h).sum(0).double().cpu()
        if self.wanted.covariance:
            h = at.h * at.weight[:, None]
            sums["mid_cov"][e] += (h.T @ h).double().cpu()
        self._pending.append((at.rows, e, weighted))

    def after(self, before: Tensor, out: Tensor) -> None:
        """The stream before and after the block, for EASY-EP."""
        moved = (1.0 - torch.nn.functional.cosine_similarity(before, out, dim=-1)).clamp_min(0.0)
        for rows, e, weighted in self._pending:
            self._sums["easy"][e] += (weighted * moved[rows]).sum(dtype=torch.float64).cpu()
        self._pending = []
        self._massive(out)

    def _massive(self, stream: Tensor) -> None:
        """Keep the stream's largest number, and what the others of its token are like."""
        largest = stream.abs().amax(-1)
        token = int(largest.argmax()) if len(largest) else 0
        if len(largest) and float(largest[token]) > float(self._sums["stream"][0]):
            typical = stream[token].abs().median()
            self._sums["stream"] = torch.stack([largest[token], typical]).double().cpu()

    def _take(self, x: Tensor) -> None:
        """Evenly spaced tokens of all that come."""
        start, self._seen = self._seen, self._seen + len(x)
        if self.wanted.sample:
            places = torch.arange(start, self._seen, dtype=torch.int64)
            share = min(self.wanted.sample, self._expected)
            hit = (places * share) // self._expected != ((places - 1) * share) // self._expected
            hit[places == 0] = True
            self._sample.append(x[hit.to(x.device)].cpu())

    def end(self) -> None:
        """Finish the layer: the dense part, then keep or write."""
        arrays = {k: v.numpy() for k, v in self._sums.items()}
        if self.wanted.sample:
            x = torch.cat(self._sample)
            arrays["x"] = x.numpy()
            if self.wanted.dense:
                arrays |= dense(x.to(self._block.router.device), self._block)
        stats = LayerStats(self._layer, self._seen, arrays)
        del self._sums, self._sample, self._block  # or the next layer would be read beside this one
        if self.folder is not None:
            save(self.folder, stats)
        else:
            self.layers[self._layer] = stats
        if self.done is not None:
            self.done(stats)


def dense(x: Tensor, block: Block) -> dict[str, np.ndarray]:
    """All experts on all of x [tokens, hidden]: mean cosine and inner product of every pair of
    outputs [E, E], mean output [E, hidden].
    """
    experts, hidden = block.experts.count, x.shape[1]
    cosine = torch.zeros(experts, experts, dtype=torch.float64)
    gram, mean = torch.zeros_like(cosine), torch.zeros(experts, hidden, dtype=torch.float64)
    step = max(1, DENSE_BYTES // (4 * experts * hidden))
    for start in range(0, len(x), step):
        out = moe.every(x[start : start + step], block.experts).transpose(
            0, 1
        )  # [tokens, E, hidden]
        inner = out @ out.transpose(1, 2)
        length = inner.diagonal(dim1=1, dim2=2).clamp_min(1e-30).sqrt()
        gram += inner.sum(0).double().cpu()
        cosine += (inner / (length[:, :, None] * length[:, None, :])).sum(0).double().cpu()
        mean += out.sum(0).double().cpu()
    return {
        "cosine": (cosine / len(x)).numpy(),
        "gram": (gram / len(x)).numpy(),
        "mean": (mean / len(x)).numpy(),
    }
