"""Derive every family's layout from the installed transformers: `python -m moetool.archs.generate
[--check] [FAMILY ...]`.

For each model type in `index.json` a tiny model is built on the meta device and asked what
`save_pretrained` would write (`revert_weight_conversion`). Dimensions are given distinct values
first, so that a shape can be written back as a formula over config fields. Nothing here runs when
moetool works on a checkpoint: the result is checked in under `families/`, and a test derives it
again and compares.

What transformers cannot tell (router law, extra prediction layers, hub quirks) stands in
`overlay.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAYERS = 4
_TEXT = ("text_config", "thinker_config.text_config", "language_config", "llm_config")

# Semantic name -> config fields that carry it, in order of preference.
FIELDS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"),
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "width": (
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "d_ff",
        "ffn_hidden_size",
        "encoder_ffn_dim",
        "hidden_dim",
    ),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_width": (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
    ),
    "shared_count": (
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
        "num_shared_expert",
    ),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "num_experts_per_token",
        "top_k_experts",
        "moe_top_k",
    ),
    "renorm": ("norm_topk_prob", "moe_renormalize"),
    "routed_scale": (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_routed_scaling_factor",
    ),
    "groups": ("n_group", "num_expert_group"),
    "vocab": ("vocab_size",),
}
# Distinct values for one probing build; sums and products of them stay distinct too.
_PROBE = {
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "intermediate_size": 336,
    "moe_intermediate_size": 176,
    "expert_ffn_hidden_size": 176,
    "shared_expert_intermediate_size": 104,
    "moe_shared_expert_intermediate_size": 104,
    "shared_intermediate_size": 104,
    "n_routed_experts": 16,
    "num_local_experts": 16,
    "num_experts": 16,
    "moe_num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 3,
    "num_shared_experts": 3,
    "moe_num_shared_experts": 3,
    "num_hidden_layers": LAYERS,
    "vocab_size": 300032,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
    "moe_layer_start_index": 1,
    "moe_layer_end_index": LAYERS - 1,
    "moe_layer_interval": 1,
    "block_auto_adjust_ff_dim": False,
    "enable_moe_block": True,
}
_INDEXER = {
    f"indexer_{k}": v
    for k, v in {
        "n_heads": 4,
        "kv_heads": 1,
        "head_dim": 64,
        "budget": 128,
        "compress_ratio": 16,
    }.items()
}
# Other values for the same fields: a formula counts only if it holds for both builds.
_SECOND = {
    "hidden_size": 320,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 56,
    "intermediate_size": 528,
    "moe_intermediate_size": 208,
    "expert_ffn_hidden_size": 208,
    "shared_expert_intermediate_size": 136,
    "moe_shared_expert_intermediate_size": 136,
    "shared_intermediate_size": 136,
    "n_routed_experts": 24,
    "num_local_experts": 24,
    "num_experts": 24,
    "moe_num_experts": 24,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "vocab_size": 310016,
}
# Families whose own default config cannot be built; a key with a leading slash stands beside the
# text config.
_MUST: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 3, "num_experts_per_tok": 2},
    "lfm2_moe": {
        "num_hidden_layers": LAYERS,
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
    },
    "lfm2": {
        "num_hidden_layers": LAYERS,
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
    },
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "aya_vision": {
        "/vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "num_attention_heads": 4,
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "qwen3_omni_moe": {
        "/talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 104},
        }
    },
}
_FLAG = re.compile(r"bias|qk_norm|qk_layernorm|use_gate|word_embed_proj|attn_output_gate")
_BASE = {
    "transformers_version",
    "architectures",
    "_name_or_path",
    "id2label",
    "label2id",
    "dtype",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "problem_type",
    "model_type",
}
_ROLES = (
    (
        r"\.(experts\.(gate_up_proj|fc1\.weight|w13_weight)|(block_sparse_moe|mlp)\.input_linear\.weight)$",
        "expert.gate_up",
    ),
    (
        r"\.(experts\.(down_proj|fc2\.weight|w2_weight)|(block_sparse_moe|mlp)\.output_linear\.weight)$",
        "expert.down",
    ),
    (r"\.experts\.(gate_up_proj_bias)$", "expert.gate_up_bias"),
    (r"\.experts\.(down_proj_bias)$", "expert.down_bias"),
    (r"\.experts\.\{expert\}\.(gate_proj|w1|linear_gate)\.weight$", "expert.gate"),
    (r"\.experts\.\{expert\}\.(up_proj|w3)\.weight$", "expert.up"),
    (r"\.experts\.\{expert\}\.(down_proj|w2)\.weight$", "expert.down"),
    (
        r"\.(shared_experts?|share_expert|shared_mlp)\.(gate_proj|w1|linear_gate)\.weight$",
        "shared.gate",
    ),
    (r"\.(shared_experts?|share_expert|shared_mlp)\.(up_proj|w3)\.weight$", "shared.up"),
    (r"\.(shared_experts?|share_expert|shared_mlp)\.(down_proj|w2)\.weight$", "shared.down"),
    (r"\.(moe\.gate_proj\.weight|ffn\.experts\.mlp\.w1)$", "expert.gate"),
    (r"\.(moe\.up_proj\.weight|ffn\.experts\.mlp\.v1)$", "expert.up"),
    (r"\.(moe\.down_proj\.weight|ffn\.experts\.mlp\.w2)$", "expert.down"),
    (r"\.experts\.expert_\{expert\}\.(wi|fc1)\.weight$", "expert.fc1"),
    (r"\.experts\.expert_\{expert\}\.(wo|fc2)\.weight$", "expert.fc2"),
    (r"\.(shared_mlp)\.input_linear\.weight$", "shared.gate_up"),
    (r"\.(shared_mlp)\.output_linear\.weight$", "shared.down"),
    (r"\.shared_expert_gate\.weight$", "shared.switch"),
    (
        r"(e_score_correction_bias|expert_bias|router_bias|balancing_biases|moe\.gate\.bias|router\.bias)$",
        "router.bias",
    ),
    (
        r"(block_sparse_moe|mlp|feed_forward|mixer|moe|ffn|\{layer\})\.(gate|router|router\.gate|router\.layer|router\.classifier|router\.proj|gate\.wg)\.weight$",
        "router",
    ),
    (r"(mlp|feed_forward|block_sparse_moe)\.(gate_proj|w1)\.weight$", "ffn.gate"),
    (r"(mlp|feed_forward|block_sparse_moe)\.(up_proj|w3)\.weight$", "ffn.up"),
    (r"(mlp|feed_forward|block_sparse_moe)\.(down_proj|w2)\.weight$", "ffn.down"),
    (r"mlp\.gate_up_proj\.weight$", "ffn.gate_up"),
    (r"(mlp|feed_forward)\.(gate_proj|w1)\.bias$", "ffn.gate_bias"),
    (r"(mlp|feed_forward)\.(up_proj|w3)\.bias$", "ffn.up_bias"),
    (r"(mlp|feed_forward)\.(down_proj|w2)\.bias$", "ffn.down_bias"),
    (
        r"(fc1|fc_in|c_fc|dense_h_to_4h|intermediate\.dense|DenseReluDense\.wi|ffn\.lin1|\bffn)\.weight$",
        "ffn.fc1",
    ),
    (
        r"(fc2|fc_out|mlp\.c_proj|dense_4h_to_h|layer\.\{layer\}\.output\.dense|DenseReluDense\.wo|ffn\.lin2|ffn_output)\.weight$",
        "ffn.fc2",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Write (or with --check compare) the layout files; returns the number of families that differ."""
    parser = argparse.ArgumentParser(prog="python -m moetool.archs.generate", description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; default: every one in index.json")
    parser.add_argument(
        "--check", action="store_true", help="compare with the checked-in files, write nothing"
    )
    args = parser.parse_args(argv)
    index = json.loads((HERE / "index.json").read_text())
    wanted = [
        (kind, name)
        for kind in ("moe", "dense")
        for name in index[kind]
        if not args.families or name in args.families
    ]
    different = 0
    for kind, name in wanted:
        text = render(derive(name, index[kind][name], kind))
        path = HERE / "families" / f"{name}.json"
        if args.check:
            if not path.exists() or path.read_text() != text:
                different += 1
                print(f"{name}: differs from {path}", file=sys.stderr)
        else:
            path.write_text(text)
    print(f"{len(wanted)} families {'compared' if args.check else 'written'}, {different} differ")
    return different


def render(layout: dict[str, Any]) -> str:
    """JSON with one tensor per line: a change in a family reads as a short diff."""
    rows = ",\n".join("  " + json.dumps(t) for t in layout["tensors"])
    head = {k: v for k, v in layout.items() if k != "tensors"}
    body = ",\n".join(
        f" {json.dumps(k)}: {json.dumps(v, sort_keys=k == 'defaults')}" for k, v in head.items()
    )
    return "{\n" + body + ',\n "tensors": [\n' + rows + "\n ]\n}\n"


def derive(model_type: str, class_name: str, kind: str) -> dict[str, Any]:
    """One family's layout as plain data; raises whatever transformers raises when it cannot be
    built.
    """
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    config_class = transformers.CONFIG_MAPPING[model_type]
    default = config_class().to_dict()
    prefix = next((p for p in _TEXT if _at(default, p) is not None), "")
    cls = getattr(transformers, class_name)
    config, probed = _probe_config(model_type, config_class, default, prefix, cls)
    model = _meta(cls, config)
    disk = _disk(model)
    text = _at(config.to_dict(), prefix) if prefix else config.to_dict()
    flags, without = (
        _flag_tensors(config_class, cls, default, prefix, model_type, set(disk))
        if probed
        else ({}, {})
    )
    terms = _both(config_class, cls, config, prefix) if probed else {}
    tensors = [
        t | ({"when": without[t["name"]]} if t["name"] in without else {})
        for t in _templates(disk, terms, kind)
    ]
    tensors += [
        dict(t, when=when)
        for when, extra in flags.items()
        for t in _templates(extra, {(a, None): f for (a, _), f in reversed(terms.items())}, kind)
    ]
    layout = {
        "model_type": model_type,
        "cls": class_name,
        "kind": kind,
        "text_config": prefix,
        "fields": _fields(text),
        "aliases": _aliases(config_class, config, prefix),
        "defaults": _defaults(config_class()),
        "tied": _tied(model),
    }
    if kind == "moe":
        layout["experts"] = _experts(model)
    layout["tensors"] = _mark_layers(tensors, LAYERS if probed else None)
    return layout


def _both(
    config_class: Any, cls: Any, config: Any, prefix: str
) -> dict[tuple[int, int | None], str]:
    """(dimension in the first build, in the second) -> formula, the plainest first."""
    data = config.to_dict()
    part = _at(data, prefix) if prefix else data
    first = _terms(part)
    changed = {k: v for k, v in _SECOND.items() if part.get(k) == _PROBE.get(k)}
    try:
        if len(changed) < 3:
            raise ValueError("nothing to vary")
        second = config_class.from_dict(json.loads(json.dumps(_replaced(data, prefix, changed))))
        text = second.to_dict()
        found = _terms(_at(text, prefix) if prefix else text)
        _SHAPES.clear()
        _SHAPES.update({_template(n)[0]: s for n, s in _disk(_meta(cls, second)).items()})
    except Exception:
        _SHAPES.clear()
        return {(value, None): formula for formula, value in reversed(first.items())}
    return {
        (value, found[formula]): formula
        for formula, value in reversed(first.items())
        if formula in found
    }


_SHAPES: dict[str, tuple[int, ...]] = {}  # shapes of the second build, by template


def _replaced(data: dict, prefix: str, values: dict) -> dict:
    if not prefix:
        return data | values
    head, _, rest = prefix.partition(".")
    return data | {head: _replaced(data[head], rest, values)}


def _at(data: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        data = data.get(part) if isinstance(data, dict) else getattr(data, part, None)
    return data


def _probe_config(
    model_type: str, config_class: Any, default: dict, prefix: str, cls: Any
) -> tuple[Any, bool]:
    """A config whose dimensions are distinct, or the class's own default where the family refuses
    ours.
    """
    values = _values(model_type, default, prefix)
    plain = {k: v for k, v in values.items() if k != "head_dim"}
    found = []
    for number, tried in enumerate(
        (
            values | {"head_dim": _PROBE["head_dim"]},
            plain,
            {k: v for k, v in plain.items() if "layer" in k or "expert" in k},
        )
    ):
        try:
            config = _with(config_class, prefix, tried)
            text = _at(config.to_dict(), prefix) if prefix else config.to_dict()
            known = set(_terms(text).values())
            unsolved = sum(
                d not in known for shape in _disk(_meta(cls, config)).values() for d in shape
            )
            found.append((unsolved, number, config))
        except Exception:
            continue
    if found:
        return min(found, key=lambda f: (f[1] == 2, *f[:2]))[2], True
    return _with(config_class, prefix, _MUST.get(model_type, {})), False


def _values(model_type: str, default: dict, prefix: str) -> dict[str, Any]:
    text_default = _at(default, prefix) if prefix else default
    return {k: v for k, v in _PROBE.items() if k in text_default} | _MUST.get(model_type, {})


def _with(config_class: Any, prefix: str, values: dict) -> Any:
    data: Any = {k: v for k, v in values.items() if not k.startswith("/")}
    for part in reversed([p for p in prefix.split(".") if p]):
        data = {part: data}
    beside = {k[1:]: v for k, v in values.items() if k.startswith("/")}
    return config_class(**json.loads(json.dumps(data | beside)))


def _meta(cls: Any, config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)


def _disk(model: Any) -> dict[str, tuple[int, ...]]:
    from transformers.core_model_loading import revert_weight_conversion

    return {
        name: tuple(t.shape)
        for name, t in revert_weight_conversion(model, model.state_dict()).items()
    }


def _flag_tensors(
    config_class: Any, cls: Any, default: dict, prefix: str, model_type: str, known: set[str]
) -> tuple[dict, dict]:
    """Tensors that appear only when one boolean config field is flipped (biases, q/k norms); and
    templates that vanish then.
    """
    text_default = _at(default, prefix) if prefix else default
    values = _values(model_type, default, prefix)
    found: dict[str, dict] = {}
    without: dict[str, str] = {}
    for field, value in text_default.items():
        if not isinstance(value, bool) or not _FLAG.search(field):
            continue
        try:
            flipped = _disk(_meta(cls, _with(config_class, prefix, values | {field: not value})))
        except Exception:
            continue
        extra = {n: s for n, s in flipped.items() if n not in known}
        if extra:
            found[f"{field}={json.dumps(not value)}"] = extra
        without |= {_template(n)[0]: f"{field}={json.dumps(value)}" for n in known - set(flipped)}
    return found, without


def _template(name: str) -> tuple[str, dict[str, int]]:
    """`a.layers.3.mlp.experts.7.w1` -> `a.layers.{layer}.mlp.experts.{expert}.w1` and the indices."""
    parts, seen = name.split("."), {}
    for i, part in enumerate(parts):
        digits = re.fullmatch(r"(expert_)?(\d+)", part)
        if not digits:
            continue
        key = "expert" if "expert" in (parts[i - 1] + part) and i else "layer"
        if key in seen:
            key = f"i{len(seen)}"
        seen[key] = int(digits[2])
        parts[i] = (digits[1] or "") + "{" + key + "}"
    return ".".join(parts), seen


def _templates(
    disk: dict[str, tuple[int, ...]], terms: dict[tuple[int, int | None], str], kind: str
) -> list[dict[str, Any]]:
    shapes: dict[str, set] = defaultdict(set)
    layers: dict[str, set] = defaultdict(set)
    for name, shape in disk.items():
        template, index = _template(name)
        shapes[template].add(shape)
        if "layer" in index:
            layers[template].add(index["layer"])
    out = []
    for template in sorted(shapes):
        sure = (
            bool(_SHAPES) or _role(template, kind) is not None
        )  # one build alone may match by accident
        shape = (
            _shape(template, next(iter(shapes[template])), terms)
            if len(shapes[template]) == 1 and terms and sure
            else None
        )
        entry: dict[str, Any] = {"name": template, "shape": shape, "role": _role(template, kind)}
        if template in layers:
            entry["layers"] = sorted(layers[template])
        out.append(entry)
    return out


def _shape(
    template: str, shape: tuple[int, ...], terms: dict[tuple[int, int | None], str]
) -> list[str | None]:
    other: tuple[int | None, ...] = _SHAPES.get(template, (None,) * len(shape))
    if len(other) != len(shape):
        other = (None,) * len(shape)
    return [
        terms.get((a, b))
        or (next((f for (x, _), f in terms.items() if x == a), None) if b is None else None)
        for a, b in zip(shape, other, strict=True)
    ]


def _role(template: str, kind: str) -> str | None:
    if re.search(r"visual|vision|audio|talker|image|patch", template):
        return None
    for pattern, role in _ROLES:
        if re.search(pattern, template) and (kind == "moe" or role.startswith("ffn")):
            return role
    return None


def _fields(text: dict) -> dict[str, str]:
    found = {k: next((f for f in names if f in text), None) for k, names in FIELDS.items()}
    return {k: v for k, v in found.items() if v}


def _terms(text: dict) -> dict[str, int]:
    """Formula -> value, the plainest formula first."""
    fields = {
        k: (f, text[f])
        for k, f in _fields(text).items()
        if isinstance(text.get(f), int) and not isinstance(text.get(f), bool)
    }
    terms: dict[str, int] = {}
    for key in ("hidden", "width", "expert_width", "shared_width", "experts", "vocab"):
        if key in fields:
            terms[fields[key][0]] = fields[key][1]
    if "heads" in fields and "hidden" in fields:
        heads, hidden = fields["heads"], fields["hidden"]
        head = text.get("head_dim") or hidden[1] // heads[1]
        kv = fields.get("kv_heads", heads)
        terms[f"{heads[0]}*head_dim"] = heads[1] * head
        terms[f"{kv[0]}*head_dim"] = kv[1] * head
        terms["head_dim"] = head
        terms[f"{heads[0]}*head_dim+2*{kv[0]}*head_dim"] = (heads[1] + 2 * kv[1]) * head
    for key in ("width", "expert_width", "shared_width"):
        if key in fields:
            terms[f"2*{fields[key][0]}"] = 2 * fields[key][1]
    if "shared_count" in fields and (per := fields.get("expert_width", fields.get("width"))):
        terms[f"{fields['shared_count'][0]}*{per[0]}"] = fields["shared_count"][1] * per[1]
        terms[f"2*{fields['shared_count'][0]}*{per[0]}"] = 2 * fields["shared_count"][1] * per[1]
    terms["1"] = 1
    return terms


def _mark_layers(tensors: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """Replace the list of layers by `all`, `moe`, `dense` or `some`."""
    moe = {i for t in tensors if str(t["role"]).startswith("expert") for i in t.get("layers", ())}
    for tensor in tensors:
        if "layers" not in tensor:
            continue
        seen = set(tensor["layers"])
        everywhere = set(range(count)) if count else None
        tensor["layers"] = (
            "all"
            if seen == everywhere
            else "moe"
            if seen == moe and everywhere != moe
            else "dense"
            if everywhere and seen == everywhere - moe
            else "some"
        )
        if (
            count
            and moe == everywhere
            and str(tensor["role"]).startswith(("expert", "router", "shared"))
        ):
            tensor["layers"] = "moe"
    return tensors


def _aliases(config_class: Any, config: Any, prefix: str) -> dict[str, str]:
    part = _at(config, prefix) if prefix else config
    return dict(getattr(type(part), "attribute_map", {}) or {})


def _defaults(config: Any) -> dict[str, Any]:
    """What a class assumes when a field is absent. A value that the class computes from others is
    written as null.
    """
    static = {n: f.default for n, f in getattr(type(config), "__dataclass_fields__", {}).items()}
    out: dict[str, Any] = {}
    for name, value in sorted(config.to_dict().items()):
        if name in _BASE:
            continue
        if isinstance(value, dict) and "model_type" in value:
            inner = getattr(config, name)
            out[name] = _defaults(inner) | {"model_type": inner.model_type}
        elif static.get(name, value) is None and name != "rope_parameters":
            out[name] = None
        else:
            out[name] = value
    return out


def _tied(model: Any) -> dict[str, str]:
    tied = getattr(model, "_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, dict) else {}


def _experts(model: Any) -> dict[str, Any]:
    """How the experts lie in memory, which is also the fused form on disk; and which forms the
    family reads.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    module = next(
        (
            m
            for n, m in model.named_modules()
            if n.endswith("experts") and hasattr(m, "is_concatenated")
        ),
        None,
    )
    memory = {
        _template(n)[0]: None for n, _ in model.named_parameters() if re.search(r"experts\.\w+$", n)
    }
    per_expert = any(
        isinstance(c, WeightConverter) and any("experts.*" in str(p) for p in c.source_patterns)
        for c in get_model_conversion_mapping(model)
    )
    flags = {
        k: bool(getattr(module, k))
        for k in ("is_transposed", "is_concatenated", "has_bias", "has_gate")
        if module is not None and hasattr(module, k)
    }
    return {"memory": sorted(memory), "reads_per_expert": per_expert, **flags}


if __name__ == "__main__":
    sys.exit(min(main(), 1))
