"""What moetool writes, tiny: every pair, layouts, pruned and merged mixtures, and what in a config
some client does not know. Routers are not zero and copies differ, so that routing counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import tiny
from surgery import tokenizers_by_hand as by_hand
from tokenizers import AddedToken

from moetool import verbs

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
PLAIN = {**WIDE, **ROPE}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e5,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    }
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5]}}
VISION = tiny.FAMILIES["qwen3_vl"][1]["vision_config"]
# What configs of mixtures on the Hub say, made by transformers 4; one that transformers 5 saves
# (condition `v5`) leaves it out.
HUB: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"num_experts": 8, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 8},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gpt_oss": {},
    "granitemoe": {},
}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "mistral": {**PLAIN, "sliding_window": None},
    "phi3": PLAIN,
    "gemma": PLAIN,
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "granite": PLAIN,
    "olmo2": PLAIN,
    "cohere2": PLAIN,
    "ernie4_5": PLAIN,
    "lfm2": {**PLAIN, "layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {**WIDE, "layer_types": ["linear_attention", "full_attention"]},
    "stablelm": WIDE,
    "llava": {"text_config": {"model_type": "llama", **PLAIN}},
    "qwen3_vl": {
        "text_config": {**WIDE, **MROPE, "intermediate_size": 192},
        "vision_config": {**VISION, "out_hidden_size": 128},
    },
    "mixtral": {**PLAIN, "num_local_experts": 8, "sliding_window": None},
    "qwen2_moe": {
        **PLAIN,
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {**PLAIN, **EXPERTS, "mlp_only_layers": []},
    "glm4_moe": {**PLAIN, **EXPERTS},
    "olmoe": {**PLAIN, "num_key_value_heads": 4, "eos_token_id": 2},
    "deepseek_v3": {**PLAIN, **EXPERTS, **MLA},
    "gpt_oss": {**WIDE, "layer_types": ["sliding_attention", "full_attention"], **YARN},
    "granitemoe": PLAIN,
}
COPIES = {"experts": 4, "top_k": 2, "router": "normal:0.5", "diversify": "noise:0.1"}
HALF = {"ratio": 0.5}
# What llama.cpp's converter asks for by name, and what such models have.
WORDS = {
    "glm4_moe": ("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|observation|>"),
}
PIECES = ("ernie4_5",)
BARE = ("-v5", "-unscaled", "-pieceless")  # sources that do not say all that the Hub's say


@dataclass(frozen=True)
class Output:
    """An output by its name: `source` with `config` goes through `verb` with `options`; without a
    verb it is the source itself, to tell what is moetool's from what is not.
    """

    name: str
    source: str
    verb: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        """Its folder below `root`, written once."""
        out = root / self.name
        source = _trained(root) if self.source == "trained" else self._source(root)
        if not self.verb:
            return source
        if not out.exists():
            verbs.make(self.verb)(str(source), str(out), **self.options)
        return out

    def _source(self, root: Path) -> Path:
        source = root / "sources" / self._key
        if not source.exists():
            tiny.save(self.source, source, **SOURCES[self.source] | self.config)
            _tokenizer(source, WORDS.get(self.source, ()))
            if self.source in PIECES and not self.name.endswith(BARE):
                (source / "tokenizer.model").write_bytes(b"toy")
            if self.source in HUB and not self.name.endswith(BARE):
                _as_on_the_hub(source / "config.json", HUB[self.source])
        return source

    @property
    def _key(self) -> str:
        """Of the name, what is about the source."""
        condition = self.name.split("-")[-1] if self.config or self.name.endswith(BARE) else ""
        return f"{self.source}-{condition}"


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


def _tokenizer(folder: Path, words: tuple[str, ...]) -> None:
    """A toy one, because llama.cpp's converter writes it; `words` it asks for by name."""
    made = by_hand.of_bytes(None)
    made.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    by_hand.save(made, folder)


def _as_on_the_hub(path: Path, more: Mapping[str, Any]) -> None:
    """Rope in the fields of transformers 4."""
    config = json.loads(path.read_text())
    rope = dict(config.pop("rope_parameters"))
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config | more))


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
    ]


def _reduced() -> list[Output]:
    """Half of the experts, without text: the way of choosing changes no form."""
    made = list(chain.from_iterable(map(_of, HUB)))
    made += _of("qwen2_moe", "sparse", {"decoder_sparse_step": 2})
    made += _of("gpt_oss", "unscaled", ROPE)[:2]
    made += _of("mixtral", "window", {"sliding_window": 16})[:2]
    for family in ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss"):
        made += _of(family, "v5")[:2]
    fused = ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3")
    return [*made, *(Output(f"{f}-converted", f, "convert_layout", {"to": "fused"}) for f in fused)]


def _of(family: str, condition: str = "", config: Mapping[str, Any] | None = None) -> list[Output]:
    """The family itself, then pruned, then merged."""
    end = f"-{condition}" if condition else ""
    prune, merge = HALF | {"method": "router-distance"}, HALF | {"method": "alike"}
    return [
        Output(f"{family}{end}", family, config=config or {}),
        Output(f"{family}-pruned{end}", family, "prune", prune, config or {}),
        Output(f"{family}-merged{end}", family, "merge", merge, config or {}),
    ]


OUTPUTS = {output.name: output for output in (*_pairs(), *_conditions(), *_reduced())}
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
