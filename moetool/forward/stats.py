"""What a walk sees of a layer's experts, in float64 sums: small enough to keep, enough for every
method.

`Profiler` is the onlooker; it leaves one safetensors file a layer, so a profile can be taken up
again where it stopped, and `Profile` reads them. Sources of the statistics: REAP arXiv 2510.13999,
EASY-EP arXiv 2504.06792, HC-SMoE arXiv 2410.08589, MoNE arXiv 2507.00390, super experts arXiv
2507.23279, STUN arXiv 2409.06211, Wanda arXiv 2306.11695.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetool import atomic, strict_json
from moetool.errors import MoetoolError
from moetool.forward.block import Block
from moetool.kernels import moe
from moetool.reading import check_regular
from moetool.surgery import identity
from moetool.surgery.checkpoint import Checkpoint

Tensor = torch.Tensor
SCHEMA = 1
FACTS = {
    "model": {"name": str, "files": list},
    "layers": list,
    "files": list,
    "tokens": int,
    "seq_len": int,
    "data_sha256": str,
    "warnings": list,
    "peak_memory": int,
}
DENSE_BYTES = 128 << 20  # of expert outputs held at once while all experts run on the sample


@dataclass(frozen=True)
class Wanted:
    """How much to keep. `sample`: tokens of a layer whose block inputs are kept (0: none);
    `dense`: run all experts on them.
    """

    files: int = 1
    sample: int = 0
    dense: bool = False
    covariance: bool = False

    def memory(self, experts: int, hidden: int, width: int) -> int:
        """Bytes held for a layer."""
        sums = 8 * experts * (4 * hidden + 2 * width + 3 * experts + 8 * self.files)
        extra = 4 * self.sample * hidden * 2 + (2 * DENSE_BYTES if self.dense else 0)
        return (
            sums
            + extra
            + (8 * (hidden * hidden + experts * width * width) if self.covariance else 0)
        )


@dataclass(frozen=True)
class LayerStats:
    """One layer's statistics as numpy arrays; E experts (zero experts, where there are any,
    come last in `count`, `gate`, `prob`).

    count, gate, reap [files, E]: tokens routed, sum of gate weights, sum of gate * |output|. prob
    [E]: sum of router scores over all tokens. norm, norm2 [E]: sums of |output| and |output|^2.
    out_sum, out_sq [E, hidden]: sums of outputs and their squares. max_in, max_out [E]: largest
    |input of down_proj| and |output|. easy [E]: sum of gate * |output| * (1 - cos(stream before,
    after)). in_sq [E, hidden], mid_sq [E, width]: sums of squared inputs of gate/up and of down.
    together [E, E]: tokens that chose both. With `dense`: cosine, gram [E, E] and mean [E, hidden]
    over `sampled` tokens. With `sample`: x [sampled, hidden]. With `covariance`: in_cov [hidden,
    hidden], mid_cov [E, width, width] (sums of outer products over routed tokens, gate-weighted
    squared).
    """

    layer: int
    tokens: int
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def __getattr__(self, name: str) -> np.ndarray:
        arrays = object.__getattribute__(self, "arrays")
        if name in arrays:
            return arrays[name]  # type: ignore[no-any-return]
        if name.startswith("__"):
            raise AttributeError(name)
        raise MoetoolError(
            f"the statistics do not hold {name!r}",
            tensor=f"layer {self.layer}",
            found=", ".join(sorted(arrays)),
            hint="make them again with `moetool profile` and the options that the method names (--covariance, --sample)",
        )

    def has(self, name: str) -> bool:
        """Whether a statistic was kept."""
        return name in self.arrays

    def total(self, name: str) -> np.ndarray:
        """A per-file statistic summed over files."""
        return np.asarray(self.arrays[name].sum(0))

    def mean(self, name: str) -> np.ndarray:
        """A sum divided by the number of tokens each expert saw (0 where it saw none)."""
        value = self.arrays[name]
        value = value.sum(0) if name in ("gate", "reap") else value
        seen = self.total("count")[: len(value)].reshape(-1, *[1] * (value.ndim - 1))
        made: np.ndarray = np.divide(value, seen, out=np.zeros(value.shape), where=seen > 0)
        return made


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


def save(folder: Path, stats: LayerStats) -> None:
    """Write a layer's file; it is whole or not there."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = folder / layer_file(stats.layer)
    arrays = {
        f"{stats.layer}.{k}": np.ascontiguousarray(_shipped(k, v)) for k, v in stats.arrays.items()
    }
    with atomic.writing(name) as temporary:
        save_file(arrays, temporary, metadata={"tokens": str(stats.tokens)})


def _shipped(name: str, value: np.ndarray) -> np.ndarray:
    """As it is kept on disk: the sample in float16, second moments (large) in float32, sums in
    float64.
    """
    if name == "x":
        small: np.ndarray = np.clip(value, -65504, 65504).astype(np.float16)
        return small
    return value.astype(np.float32) if name in ("in_cov", "mid_cov") else value


@dataclass(frozen=True)
class Profile:
    """A folder of statistics: `facts` (profile.json) and a file a layer."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Profile:
        """Read profile.json; MoetoolError when the folder is none, or its profile was not finished."""
        folder = Path(path)
        if not (folder / "profile.json").is_file():
            left = (
                "an unfinished profile: run the same command again to finish it"
                if list(folder.glob("layer-*.safetensors"))
                else "make it with `moetool profile MOE DIR --calibrate FILE`"
            )
            raise MoetoolError(
                "no statistics here",
                file=folder,
                expected="profile.json",
                found="nothing" if not folder.exists() else "a folder without it",
                hint=left,
            )
        try:
            facts = strict_json.load(folder / "profile.json", "profile", file_names=True)
        except MoetoolError as problem:
            raise MoetoolError(
                f"profile.json is not readable: {problem.message}",
                file=folder / "profile.json",
                hint="make the profile again",
            ) from None
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
            raise MoetoolError(
                "these statistics are of another version",
                file=folder / "profile.json",
                expected=f"schema {SCHEMA}",
                found=facts.get("schema") if isinstance(facts, dict) else facts,
                hint="make the profile again",
            )
        strict_json.check_shape(facts, FACTS, folder / "profile.json", "profile")
        for part in facts["files"] or [{}]:
            strict_json.check_shape(
                part, {"name": str, "tokens": int}, folder / "profile.json", "profile"
            )
        return cls(folder, facts)

    def check_model(self, source: Checkpoint) -> None:
        """Refuse statistics of another model, a fine-tune with the same headers included."""
        known = self.facts["model"]
        if known["files"] == source.fingerprint():
            sealed = known.get("content")  # 0.2.0 knew headers only
            if sealed is None or sealed == identity.content(source):
                return
        raise MoetoolError(
            "these statistics are of another model",
            file=self.folder,
            expected=f"the weights of {source.folder}",
            found=f"those of {known['name']} when the profile was made",
            hint="give the profile of this model, or --calibrate",
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was said when it was made, and what cannot be said of it."""
        said = tuple(dict.fromkeys(self.facts["warnings"]))
        if "content" in self.facts["model"]:
            return said
        return (
            *said,
            f"{self.folder} was made by moetool 0.2.0, which kept no sign of the weights: that it "
            "is of this very model cannot be told",
        )

    def layer(self, number: int) -> LayerStats:
        """One layer's statistics; MoetoolError when its file is not the one that was made."""
        known, name = self.facts.get("layer_files", {}).get(str(number)), layer_file(number)
        if known is not None and (self.folder / name).is_file():
            found = identity.of_file(self.folder / name)
            if found != known:
                raise MoetoolError(
                    "the statistics of a layer were changed",
                    file=self.folder / name,
                    expected=known,
                    found=found,
                    hint="make the profile again",
                )
        return load_layer(self.folder, number)


def layer_file(number: int) -> str:
    """Name of a layer's file in a folder of statistics."""
    return f"layer-{number:05d}.safetensors"


def load_layer(folder: Path, number: int) -> LayerStats:
    """Read a layer's file; MoetoolError when it is missing, broken, another layer's or holds NaN."""
    from safetensors import SafetensorError, safe_open

    name, arrays = folder / layer_file(number), {}
    try:
        check_regular(name, "statistics of a layer")
        with safe_open(name, "np") as handle:
            tokens = int(handle.metadata()["tokens"])
            for key in handle.keys():  # noqa: SIM118
                layer, _, kind = key.partition(".")
                if layer != str(number):
                    raise KeyError(f"it is of layer {layer}")
                arrays[kind] = handle.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise MoetoolError(
            f"the statistics of a layer are not readable: {problem}",
            file=name,
            hint="make the profile again",
        ) from None
    wrong = next((k for k in sorted(arrays) if not np.isfinite(arrays[k]).all()), None)
    if wrong is not None:
        raise MoetoolError(
            "the statistics of a layer hold NaN or inf",
            file=name,
            tensor=wrong,
            expected="finite numbers",
            found="NaN or inf",
            hint="a weight is NaN or inf, or the model overflows on this text: --strict names bad "
            "weights; then make the profile again",
        )
    return LayerStats(number, tokens, arrays)
