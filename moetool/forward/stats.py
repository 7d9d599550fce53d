"""What a walk sees of a layer's experts, in float64 sums: small enough to keep, enough for every
method.

`Profiler` is the onlooker; it leaves one safetensors file a layer, so a profile can be taken up
again where it stopped, and `Profile` reads them. Sources of the statistics: REAP arXiv 2510.13999,
EASY-EP arXiv 2504.06792, HC-SMoE arXiv 2410.08589, MoNE arXiv 2507.00390, super experts arXiv
2507.23279, STUN arXiv 2409.06211, Wanda arXiv 2306.11695.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from moetool import atomic, strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.reading import check_regular
from moetool.surgery import identity
from moetool.surgery.checkpoint import Checkpoint

Tensor = torch.Tensor
SCHEMA = 1
MOMENTS = ("in_cov", "mid_cov")  # second moments
FACTS = {
    "model": {"name": str, "files": list},
    "layers": list,
    "files": list,
    "experts": int,
    "top_k": int,
    "tokens": int,
    "seq_len": int,
    "data_sha256": str,
    "warnings": list,
    "peak_memory": int,
    "seconds": (int, float),
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
    together [E, E]: tokens that chose both. stream [2]: the largest |number| of the residual
    stream after the layer, and the median of its token's (arXiv 2402.17762). With `dense`: cosine,
    gram [E, E] and mean [E, hidden] over `sampled` tokens. With `sample`: x [sampled, hidden]. With
    `covariance`: in_cov [hidden, hidden], mid_cov [E, width, width] (sums of outer products over
    routed tokens, gate-weighted squared).
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
    return value.astype(np.float32) if name in MOMENTS else value


def moments_as_kept(stats: LayerStats) -> LayerStats:
    """The same with its second moments as a file holds them, for who decides and writes at once."""
    kept = {k: _shipped(k, v) if k in MOMENTS else v for k, v in stats.arrays.items()}
    return replace(stats, arrays=kept)


@dataclass(frozen=True)
class Profile:
    """A folder of statistics: `facts` (profile.json) and a file a layer."""

    folder: Path
    facts: JsonObject

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
        for name, kind in (("warnings", str), ("layers", int)):
            for part in facts[name]:
                strict_json.check_shape(
                    {name: part}, {name: kind}, folder / "profile.json", "profile"
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
