"""What moetool writes, tiny: every pair, layouts, pruned and merged mixtures, and what in a config
some client does not know. Routers are not zero and copies differ, so that routing counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from methods import upcycled

from clients import sources
from clients.sources import HUB, ROPE
from moetool import verbs

COPIES = {"experts": 4, "top_k": 2, "router": "normal:0.5", "diversify": "noise:0.1"}
HALF, PRUNE = {"ratio": 0.5}, {"method": "router-distance"}


@dataclass(frozen=True)
class Output:
    """An output by its name: `source` (a family with `config`, or another output) goes through
    `verb` with `options`; without a verb it is the source itself, to tell what is moetool's from
    what is not.
    """

    name: str
    source: str | Output
    verb: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Of a chain of outputs, the first source's."""
        return self.source.family if isinstance(self.source, Output) else self.source

    def write(self, root: Path) -> Path:
        """Its folder below `root`, written once."""
        out, source = root / self.name, self._from(root)
        if not self.verb:
            return source
        if not out.exists():
            verbs.make(self.verb)(str(source), str(out), **self.options)
        return out

    def _from(self, root: Path) -> Path:
        if isinstance(self.source, Output):
            return self.source.write(root)
        if self.source == "trained":
            return _trained(root)
        bare = self.name.rpartition("-")[2] in sources.BARE
        condition = self.name.rpartition("-")[2] if self.config or bare else ""
        folder = root / "sources" / f"{self.source}-{condition}"
        if not folder.exists():
            sources.save(self.source, folder, self.config, condition)
        return folder


class Learned(Output):
    """An output whose experts are no longer what they were at birth: of the usual one, those that
    change an FFN change nothing.
    """

    def write(self, root: Path) -> Path:
        """Its folder below `root`, written and drawn anew once."""
        new = not (root / self.name).exists()
        out = super().write(root)
        if new:
            upcycled.train(out)
        return out


def trained() -> Path:
    """SmolLM2-135M, as tests/every/test_real.py made it."""
    cache = os.environ.get("MOETOOL_TEST_CACHE", Path.home() / ".cache" / "moetool-tests")
    return Path(cache) / "SmolLM2-135M-Instruct"


def _trained(root: Path) -> Path:
    """The same with the tokenizer's class as on the Hub: transformers 4, under which llama.cpp
    converts, does not know the one that transformers 5 writes.
    """
    folder, told = root / "sources" / "trained", "tokenizer_config.json"
    if not folder.exists():
        shutil.copytree(trained(), folder)
        said = json.loads((folder / told).read_text())
        (folder / told).write_text(json.dumps(said | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def _upcycle(name: str, config: Mapping[str, Any] | None = None, **options: Any) -> Output:
    """`name` is source-target or source-target-condition."""
    source, target, *_ = name.split("-")
    return Output(name, source, "upcycle", COPIES | {"target": target} | options, config or {})


def _pairs() -> list[Output]:
    from moetool.surgery.pair import pairs

    return [_upcycle(f"{pair.source}-{pair.target}") for pair in pairs()]


TIED = {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FINE = {"experts": 16, "split": 4, "top_k": 4}
FUSED = {"layout": "fused"}
# Some clients take the weight of a single expert otherwise than the config says.
ONE_OF_MANY = (
    "llama-mixtral",
    "llama-glm4_moe",
    "qwen3-qwen3_moe",
    "qwen3-dots1",
    "granite-granitemoe",
    "ernie4_5-ernie4_5_moe",
    "lfm2-lfm2_moe",
    "olmo2-flex_olmo",
)


def _conditions() -> list[Output]:
    return [
        _upcycle("llama-mixtral-fine", **FINE),
        _upcycle("llama-mixtral-tied", TIED),
        _upcycle("llama-mixtral-llama3rope", {"rope_parameters": LLAMA3}),
        _upcycle("llama-mixtral-headdim", {"head_dim": 64}),
        _upcycle("mistral-mixtral-window", {"sliding_window": 16}),
        _upcycle("qwen2-qwen2_moe-tied", TIED),
        _upcycle("llama-qwen2_moe-tied", TIED),
        _upcycle("llama-qwen2_moe-shared", shared=True, split=2),
        _upcycle("llama-qwen2_moe-headdim", {"head_dim": 64}),
        _upcycle("llama-qwen2_moe-llama3rope", {"rope_parameters": LLAMA3}),
        _upcycle("llama-glm4_moe-shared", shared=True, split=2),
        _upcycle("llama-glm4_moe-tied", TIED, shared=True, split=2),
        _upcycle("llama-glm4_moe-llama3rope", {"rope_parameters": LLAMA3}),
        _upcycle("qwen3-dots1-shared", shared=True, split=2),
        _upcycle("qwen3-qwen3_moe-headdim", {"head_dim": 64}),
        _upcycle("qwen3-qwen3_moe-tied", TIED),
        _upcycle("llama-mixtral-fused", **FUSED),
        _upcycle("qwen2-qwen2_moe-fused", **FUSED),
        _upcycle("qwen3-qwen3_moe-fused", **FUSED),
        _upcycle("llama-glm4_moe-fused", **FUSED),
        _upcycle("qwen3-dots1-fused", **FUSED),
        _upcycle("olmo2-flex_olmo-fused", **FUSED),
        _upcycle("cohere2-cohere2_moe-fused", **FUSED),
        _upcycle("ernie4_5-ernie4_5_moe-pieceless"),
        _upcycle("ernie4_5-ernie4_5_moe-fused", **FUSED),
        _upcycle("lfm2-lfm2_moe-fused", **FUSED),
        _upcycle("granite-granitemoe-fused", **FUSED),
        *(_upcycle(f"{pair}-top1", top_k=1) for pair in ONE_OF_MANY),
        _upcycle("llama-qwen2_moe-top1", top_k=1, shared=True, split=2),
    ]


def _reduced() -> list[Output]:
    """Half of the experts, without text: the way of choosing changes no form."""
    made = list(chain.from_iterable(map(_of, HUB)))
    made += _of("qwen2_moe", "sparse", {"decoder_sparse_step": 2})
    made += _of("gpt_oss", "unscaled", ROPE)[:2]
    made += _of("mixtral", "window", {"sliding_window": 16})[:2]
    for family in ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"):
        made += _of(family, "v5")[:2]
    made += _of("deepseek_v2", "unscaled", ROPE)[:2]
    made += _of("deepseek_v3", "top1", {"num_experts_per_tok": 1})[:2]
    for pair in ("olmo2-flex_olmo", "cohere2-cohere2_moe", "lfm2-lfm2_moe", "qwen3-dots1"):
        eight = _upcycle(pair, experts=8)
        eight = replace(eight, name=f"{pair}-eight")
        made.append(Output(f"{pair}-pruned", eight, "prune", HALF | PRUNE))
    fused = ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3")
    return [*made, *(Output(f"{f}-converted", f, "convert_layout", {"to": "fused"}) for f in fused)]


THETAS = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
}
# Dense families whose files are worth a try; of some, what clients tell apart in their configs.
DENSE = (
    *("llama", "mistral", "phi3", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "granite"),
    *("olmo2", "cohere2", "ernie4_5", "lfm2", "stablelm", "starcoder2", "qwen3_5_text", "opt"),
)
ASKED: dict[str, Mapping[str, Any]] = {
    "llama-tied": TIED,
    "llama-llama3rope": {"rope_parameters": LLAMA3},
    "llama-headdim": {"head_dim": 64},
    "mistral-window": {"sliding_window": 16},
    "gemma2-theta": ROPE,
    "gemma2-wide": {"sliding_window": 256},
    "gemma3_text-wide": {"sliding_window": 256},
    "gemma3_text-theta": THETAS,
    "cohere2-window": {"sliding_window": 16},
    "qwen2-tied": TIED,
    "qwen3-tied": TIED,
}


def _full_again() -> list[Output]:
    """Quantized, and written in full once more: of dense models, and of one with experts."""
    asked = {family: {} for family in (*DENSE, "mixtral")} | ASKED
    made = [_dequantized(name, config) for name, config in asked.items()]
    return [*made, Output("gemma3_text-theta", "gemma3_text", config=THETAS)]


def _dequantized(name: str, config: Mapping[str, Any]) -> Output:
    family, _, condition = name.partition("-")
    how = {"format": "int8/32", "method": "rtn", "loader_check": False}
    coded = Output("-".join(filter(None, (family, "int8", condition))), family, "quantize", how)
    coded = replace(coded, config=config)
    return Output(coded.name.replace("int8", "dequantized"), coded, "dequantize")


def _materialized() -> list[Output]:
    """Experts of moetool's own, in full as a class of transformers: source-target-form."""
    lora, ternary = {"form": "lora", "rank": 4}, {"form": "ternary", "scale_group": 32}
    one = {"law": "hard", "top_k": 1}
    asked: dict[str, Mapping[str, Any]] = {
        "llama-mixtral-lora": lora,
        "qwen3-qwen3_moe-lora": lora,
        "qwen2-qwen2_moe-lora": lora | {"law": "softmax"},
        "llama-glm4_moe-lora": lora | one,
        "llama-qwen2_moe-ternary": ternary,
        "qwen2-qwen2_moe-ternary": ternary | {"exact": True},
    }
    made = []
    for name, options in asked.items():
        source, target, _ = name.split("-")
        own = Learned(f"{name}-own", source, "upcycle", {"experts": 4, "top_k": 2} | options)
        made.append(Output(name, own, "materialize", {"target": target}))
    return made


def _of(family: str, condition: str = "", config: Mapping[str, Any] | None = None) -> list[Output]:
    """The family itself, then pruned, then merged."""
    end = f"-{condition}" if condition else ""
    prune, merge = HALF | PRUNE, HALF | {"method": "alike"}
    return [
        Output(f"{family}{end}", family, config=config or {}),
        Output(f"{family}-pruned{end}", family, "prune", prune, config or {}),
        Output(f"{family}-merged{end}", family, "merge", merge, config or {}),
    ]


OUTPUTS = {
    output.name: output
    for output in (*_pairs(), *_conditions(), *_reduced(), *_full_again(), *_materialized())
}
# Of trained weights, the same function as the dense model's.
_THREE = {"experts": 3, "top_k": 2, "router": "normal:0.5"}
_BESIDE = {"experts": 2, "top_k": 1, "shared": True, "split": 2}
TRAINED = {
    output.name: output
    for output in (
        Output("trained-mixtral", "trained", "upcycle", _THREE | {"target": "mixtral"}),
        Output("trained-qwen2_moe", "trained", "upcycle", _THREE | {"target": "qwen2_moe"}),
        Output("trained-qwen2_moe-shared", "trained", "upcycle", _BESIDE | {"target": "qwen2_moe"}),
        Output("trained-glm4_moe", "trained", "upcycle", _THREE | {"target": "glm4_moe"}),
        Output("trained-glm4_moe-shared", "trained", "upcycle", _BESIDE | {"target": "glm4_moe"}),
    )
}
