"""Families in GGUF files: names and kinds as the `gguf` package has them, values as its own
dequantizer and transformers' reader give them, and back again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map, quants
from surgery.gguf_models import OVERRIDES

import moetool as api
from moetool.errors import MoetoolError
from moetool.kernels import turn
from moetool.surgery import reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.containers import gguf as files
from moetool.surgery.forms import formats, named
from moetool.surgery.gguf import families, fields
from moetool.surgery.layout import DATA, Layout
from moetool.surgery.plan import Outputs
from moetool.surgery.spec import InParts, Piece, Stored, Target, Task, whole
from moetool.surgery.text_model import text_model

Made = Callable[..., Path]
KINDS = sorted(files.KINDS)
# transformers' name maps know it under another word, or the table has it as a stack.
UNKNOWN = ("e_score_correction_bias", "experts.gate_up_proj", "_proj_bias", "kv_b_proj.weight")


@pytest.fixture(scope="module")
def written(models: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """written("llama", "gguf:f16") -> the tiny model, whose weights float16 holds, so written."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def get(family: str, form: str, **more: Any) -> Path:
        key = f"{family}-{form}".replace(":", "-")
        if key not in made:
            made[key] = root / key
            source = models(family, dtype="float16", **OVERRIDES[family])
            api.quantize(str(source), str(made[key]), format=form, **more)
        return made[key]

    return get


def source(models: Made, family: str) -> Checkpoint:
    return Checkpoint.open(models(family, dtype="float16", **OVERRIDES[family]))


def test_every_family_has_a_model_here() -> None:
    assert sorted(families.families()) == sorted(OVERRIDES)
    data = json.loads((DATA / "gguf.json").read_text())
    with pytest.raises(TypeError):
        families.Dialect(**data["families"]["llama"], typo=1)


@pytest.mark.parametrize("family", OVERRIDES)
def test_names_are_those_of_the_package(family: str) -> None:
    """Every slot of the layout has a place or is known to have none, under the package's name."""
    dialect, layout = families.families()[family], Layout.load(family)
    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == dialect.arch)
    known, seen = get_tensor_name_map(arch, 3), 0
    for slot in layout.tensors:
        said = dialect.names.get(slot.name, dialect.names.get(str(slot.role)))
        if said is None or slot.name.endswith(UNKNOWN):
            continue
        plain = slot.name.replace(".{expert}", "").replace("{layer}", "2")
        theirs = known.get_name(plain, (".weight", ".bias"))
        (place,) = families.Place.read(said)
        mine = place.name.replace("{layer}", "2")
        assert mine.removesuffix(".weight") == str(theirs).removesuffix(".weight")
        seen += 1
    assert seen >= 12
    heads = {t.name.partition("{layer}")[2] for t in layout.tensors}
    strange = [n for n in dialect.names if n.partition("{layer}")[2] not in heads | {""}]
    usual = json.loads((DATA / "gguf.json").read_text())["usual"]["names"]
    assert [n for n in strange if n not in usual] == []


@pytest.mark.parametrize("family", OVERRIDES)
def test_every_formula_counts(models: Made, family: str) -> None:
    at = text_model(source(models, family).config)
    dialect = families.family(at)
    named_ = {f.key: f for f in fields.fields(at, dialect, "tiny", 1)}
    for key, kind, formula in dialect.fields:
        full = f"{dialect.arch}.{key}"
        if full in named_:
            assert named_[full].kind == kind
        else:
            assert "group" in key, formula


@pytest.mark.parametrize("family", OVERRIDES)
def test_there_and_back(models: Made, written: Made, family: str) -> None:
    """f16 holds every weight: each is read back as it was, under its own name, and none is
    missing.
    """
    out = written(family, "gguf:f16")
    (theirs,) = [p for p in out.iterdir() if p.suffix == ".gguf"]
    assert theirs.name == "model.gguf"
    base, back = source(models, family), Checkpoint.open(out)
    assert set(back.tensors) == set(base.tensors)
    for name in base.tensors:
        assert torch.equal(back.matrix(name).float(), base.matrix(name).float()), name
    found = api.verify(str(out), against=[base.folder])
    assert found["verified"] == "bytes" and found["structure"]["tensors"] == len(back.stored)
    assert found["structure"]["names_checked"] >= len(base.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_the_packages_own_dequantizer(written: Made, kind: str) -> None:
    """Stacks of experts, a permuted attention, an embedding: what the file holds is what its
    reader is told that it holds.
    """
    plan = ",".join(f"{r}=gguf:{kind}" for r in ("experts", "attn"))
    family = "mixtral"
    small = kind.startswith("tq")
    out = written(family, f"gguf:{kind}") if not small else None
    if out is None:
        pytest.skip("rows of 64 are no whole number of blocks of 256: tests/kernels has them")
    back = Checkpoint.open(out)
    theirs = {t.name: t for t in gguf.GGUFReader(out / "model.gguf").tensors}
    stack = theirs["blk.1.ffn_down_exps.weight"]
    assert stack.tensor_type.name == kind.upper(), plan
    values = quants.dequantize(stack.data, stack.tensor_type)
    for expert in range(8):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        assert np.array_equal(back.matrix(name).numpy(), values[expert])
    query = theirs["blk.0.attn_q.weight"]
    turned = quants.dequantize(query.data, query.tensor_type)
    mine = back.matrix("model.layers.0.self_attn.q_proj.weight")
    assert np.array_equal(turn.turned(mine, ["rope", 4]).numpy(), turned)
    assert theirs["token_embd.weight"].tensor_type.name == "Q8_0"
    assert theirs["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    part = Piece(name, (2, 128), 5 * 128)  # rows of an expert, read alone
    assert np.array_equal(back.matrix(part).numpy(), values[7, 5:7])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("form", ["gguf:f16", "gguf:q4_0", "gguf:q8_0"])
def test_transformers_reads_the_same_values(written: Made, family: str, form: str) -> None:
    """Its own reader of GGUF files (of Qwen3 with `config=`, since it does not map every width)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    out = written(family, form)
    how = {"config": AutoConfig.from_pretrained(out)} if family.startswith("qwen3") else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True, **how
    )
    assert not any(v for k, v in info.items() if k in ("missing_keys", "unexpected_keys"))
    back, state = Checkpoint.open(out), model.state_dict()
    stacked = {n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    for name in set(back.tensors) & set(state):
        assert torch.equal(back.matrix(name), state[name]), name
    for name in stacked:
        head, _, role = name.rpartition(".")
        words = ("gate_proj", "up_proj") if role == "gate_up_proj" else ("down_proj",)
        for expert, matrix in enumerate(state[name]):
            parts = [back.matrix(f"{head}.{expert}.{w}.weight") for w in words]
            assert torch.equal(torch.cat(parts), matrix), name
    assert len(set(back.tensors) & set(state)) + 12 * len(stacked) == len(back.tensors)


def test_mxfp4_of_gpt_oss_loses_nothing(models: Made, tmp_path: Path) -> None:
    import packed

    made = packed.save_mxfp4(models("gpt_oss", **OVERRIDES["gpt_oss"]), tmp_path / "packed")
    out = tmp_path / "out"
    api.quantize(str(made), str(out), plan="experts=gguf:mxfp4")
    base, back = Checkpoint.open(made), Checkpoint.open(out)
    experts = [n for n in base.tensors if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    for name in experts:
        assert torch.equal(back.matrix(name), base.matrix(name)), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_a_plan_by_roles(models: Made, tmp_path: Path) -> None:
    made = models("qwen3_moe", dtype="float16", **OVERRIDES["qwen3_moe"])
    plan = "experts=gguf:q4_0,attn=gguf:q8_0,embed=gguf:q5_1,lm_head=gguf:f16"
    api.quantize(str(made), str(tmp_path / "out"), plan=plan)
    head = files.read_head(tmp_path / "out" / "model.gguf")
    kinds = {t.name: head.types.get(t.name, t.dtype) for t in head.tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == "q4_0" and kinds["blk.1.attn_k.weight"] == "q8_0"
    assert kinds["token_embd.weight"] == "q5_1" and kinds["output.weight"] == "F16"
    assert {kinds[n] for n in kinds if n.endswith(("norm.weight", "inp.weight"))} == {"F32"}
    assert head.value("general.file_type") == files.FILE_TYPES["q4_0"]


def test_half_a_plan_leaves_the_rest_as_it_is(models: Made, tmp_path: Path) -> None:
    made = models("qwen3_moe", dtype="bfloat16", **OVERRIDES["qwen3_moe"])
    api.quantize(str(made), str(tmp_path / "out"), plan="experts=gguf:q4_0")
    head = files.read_head(tmp_path / "out" / "model.gguf")
    kinds = {t.name: head.types.get(t.name, t.dtype) for t in head.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "BF16"
    assert kinds["blk.0.attn_q_norm.weight"] == "F32"


@pytest.mark.parametrize("search", ["none", "mse"])
def test_several_files_on_any_number_of_workers(models: Made, tmp_path: Path, search: str) -> None:
    made, seen = models("qwen3_moe", dtype="float16", **OVERRIDES["qwen3_moe"]), []
    for jobs in (1, 3):
        out = tmp_path / f"out{jobs}"
        how = {"max_shard_size": 100_000, "jobs": jobs, "search": search}
        api.quantize(str(made), str(out), format="gguf:q5_0", **how)
        seen.append({p.name: p.read_bytes() for p in sorted(out.glob("*.gguf"))})
    assert seen[0] == seen[1] and len(seen[0]) > 2
    assert not list(out.glob("*.json.index"))
    assert api.verify(str(out), against=[str(made)])["verified"] == "bytes"


def test_what_was_solved_is_not_rounded_again(models: Made, tmp_path: Path) -> None:
    """A permuted attention whose codes somebody chose: its rows move as they are."""
    base = source(models, "llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = base.tensor(name).shape
    form = named("gguf")
    target = Target(name, "F16", shape)
    (part,) = form.parts(target, {"kind": "q4_0"})
    lying = Stored(name, part.dtype, part.shape, "solved", 0, part.size)
    matrix = replace(
        lying, dtype="F16", shape=shape, parts=InParts("gguf", (lying,), {"kind": "q4_0"})
    )
    solved = Checkpoint(
        "", {}, {name: matrix}, {"solved": (part.size, "")}, {name: lying}, {"": {}}
    )
    out = Target("blk.0.attn_q.weight", "F16", shape)
    task = Task("turn", (whole(matrix, 1),), (whole(out),), {"turn": ["rope", 4]})
    said = {"name": "gguf", "types": {out.name: "q4_0"}, "fields": []}
    into = {out.name: reform.Into("gguf", {"kind": "q4_0"}, {"search": "mse"})}
    wanted = Outputs(base.config, [out], [task], {}, said)
    made = reform.plan([base, solved], wanted, max_shard=10**9, form="full", into=into)
    assert made.tasks == (
        Task(
            "turn",
            (Piece(name, part.shape, 0, 1),),
            (Piece(out.name, part.shape),),
            {"turn": ["rope", 4]},
        ),
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_solved_with_text(models: Made, tmp_path: Path, family: str) -> None:
    """Experts in stacks, permuted attention, a matrix that is cut in two: all near their source,
    and sealed.
    """
    made = models(family, dtype="float16", **OVERRIDES[family])
    draw = np.random.default_rng(0)
    rows = [json.dumps({"input_ids": draw.integers(0, 160, 64).tolist()}) for _ in range(8)]
    (tmp_path / "ids.jsonl").write_text("\n".join(rows))
    text = {"calibrate": [str(tmp_path / "ids.jsonl")], "tokens": 512, "seq_len": 64}
    report = api.quantize(str(made), str(tmp_path / "out"), format="gguf:q4_0", **text)
    said = [w for w in report["warnings"] if "cut in two for llama.cpp" in w]
    assert len(said) == (family == "deepseek_v3")
    assert sum("takes a Mixtral for a Llama" in w for w in report["warnings"]) == (not said)
    base, back = Checkpoint.open(made), Checkpoint.open(tmp_path / "out")
    for name in base.tensors:
        x, y = base.matrix(name).float(), back.matrix(name).float()
        assert (x - y).norm() < 0.2 * x.norm(), name
    found = api.verify(str(tmp_path / "out"), against=[str(made)])
    assert found["bytes"]["sealed_tensors"] > 30 and found["verified"] == "bytes"


TURNS = [
    (["same"], (6, 4)),
    (["rope", 3], (12, 5)),
    (["rope", 3], (12,)),
    (["flat"], (1, 7)),
    (["transposed"], (3, 4, 5)),
    (["every", 0], (3, 8)),
    (["every_transposed", 0], (3, 4, 8)),
    (["keys", 2, 3, 4], (14, 5)),
]


@pytest.mark.parametrize(("how", "shape"), TURNS)
def test_turns_there_and_back(how: list[Any], shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape)).reshape(shape).float()
    other = {"every": 1, "every_transposed": 1}.get(how[0])
    parts = [turn.turned(x, how)]
    if other is not None:
        parts.append(turn.turned(x, [how[0], other]))
    if how[0] == "keys":
        parts.append(turn.turned(x, ["values", *how[1:]]))
        assert turn.shape_of(shape, ["values", *how[1:]]) == tuple(parts[1].shape)
    assert turn.shape_of(shape, how) == tuple(parts[0].shape)
    assert turn.shape_before(parts[0].shape, how) == shape
    assert torch.equal(turn.back(parts, how), x)


def test_frequencies_as_transformers_stretches_them(models: Made) -> None:
    """llama3's positions: what transformers multiplies each frequency by, inverted."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    at = text_model(source(models, "llama").config)
    config = AutoConfig.from_pretrained(source(models, "llama").folder)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 16, 2).double() / 16)
    made = torch.tensor(fields.rope_factors(at))
    assert torch.allclose((plain / made).float(), theirs, rtol=1e-5)
    assert made.min() == 1 and made.max() == 8


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma", {}, "how llama.cpp names the tensors of gemma"),
    ("qwen3_moe", {"norm_topk_prob": False}, "as if norm_topk_prob were True"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "no place for a tensor"),
    ("olmoe", {"num_key_value_heads": 2}, "as if num_key_value_heads were 4"),
    ("llama", {"hidden_act": "gelu"}, "as if hidden_act were silu"),
    (
        "qwen2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "positions of the kind 'dynamic'",
    ),
]


@pytest.mark.parametrize(("family", "change", "why"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise(
    models: Made, tmp_path: Path, family: str, change: dict[str, Any], why: str
) -> None:
    made = models(family, **({**OVERRIDES.get(family, {}), **change}))
    with pytest.raises(MoetoolError, match=why) as caught:
        api.quantize(str(made), str(tmp_path / "out"), format="gguf:f16")
    assert caught.value.hint and not (tmp_path / "out").exists()


def test_rows_that_no_block_divides(models: Made, tmp_path: Path) -> None:
    made = models("qwen3_moe", **{**OVERRIDES["qwen3_moe"], "moe_intermediate_size": 48})
    with pytest.raises(MoetoolError, match="rows of 48 are no whole number of blocks of 32") as no:
        api.quantize(str(made), str(tmp_path / "out"), format="gguf:q4_0")
    assert "down_proj" in str(no.value.where["tensor"])
    # what llama.cpp itself cuts out of a matrix may be too narrow: that is f16, and is said
    narrow = models("deepseek_v3", **{**OVERRIDES["deepseek_v3"], "qk_nope_head_dim": 16})
    report = api.quantize(str(narrow), str(tmp_path / "out"), format="gguf:q4_0")
    assert any("2 tensors are written in f16" in w for w in report["warnings"])
    head = files.read_head(tmp_path / "out" / "model.gguf")
    assert "blk.0.attn_k_b.weight" not in head.types
    assert head.types["blk.0.attn_v_b.weight"] == "q4_0"


def test_what_half_precision_cannot_hold() -> None:
    form, matrix = named("gguf"), torch.tensor([[7e4, 1.0]])
    with pytest.raises(MoetoolError, match="half precision"):
        form.encode(matrix, {"kind": "f16"})
    assert form.encode(matrix, {"kind": "bf16"})[0] is matrix


def test_one_file_holds_one_kind_of_format(models: Made, tmp_path: Path) -> None:
    made = models("qwen3_moe", **OVERRIDES["qwen3_moe"])
    with pytest.raises(MoetoolError, match="mixes formats of GGUF files with others"):
        api.quantize(str(made), str(tmp_path / "out"), plan="experts=gguf:q4_0,attn=int8/32")
    words = [w for w, form in formats().items() if form == "gguf"]
    assert sorted(words) == sorted(f"gguf:{k}" for k in (*KINDS, "f16", "bf16"))


@pytest.mark.parametrize(
    ("dtype", "kind", "exact"),
    [("bfloat16", "bf16", True), ("float32", "bf16", False), ("bfloat16", "q8_0", False)],
)
def test_what_keeps_its_16_bits_is_exact(
    dtype: str, kind: str, exact: bool, models: Made, tmp_path: Path
) -> None:
    made = models("qwen3_moe", **{**OVERRIDES["qwen3_moe"], "dtype": dtype})
    report = api.quantize(str(made), str(tmp_path / "out"), format=f"gguf:{kind}")
    said = report["certificate"]
    assert said["level"] == ("exact" if exact and not report["warnings"] else "none")
    assert ("rounded" in said["why"]) == (not exact)
    assert report["proof"]["matrices"] == sum(r["matrices"] for r in report["roles"].values())
    assert (report["proof"]["relative_error"] == 0) == exact
    again = api.verify(str(tmp_path / "out"), against=[str(made)])
    assert again["certificate"]["level"] == said["level"]


def test_a_part_of_another_family_is_refused_by_that_name(models: Made, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="the tensors of llava is not known") as problem:
        api.quantize(str(models("llava")), str(tmp_path / "out"), format="gguf:q8_0")
    assert problem.value.where["found"] == "llava"


def test_a_window_is_said(models: Made, tmp_path: Path) -> None:
    made = models("mistral", **{**OVERRIDES["mistral"], "sliding_window": 8})
    report = api.quantize(str(made), str(tmp_path / "out"), format="gguf:q8_0")
    said = "llama.cpp attends to the whole context, not to a window of 8 tokens"
    assert said in report["warnings"]


def test_other_verbs_take_it(written: Made, tmp_path: Path) -> None:
    """Pruned and dequantized it is a plain checkpoint again, of what the file holds."""
    out = written("qwen3_moe", "gguf:q4_0")
    api.dequantize(str(out), str(tmp_path / "full"), dtype="float32")
    back, full = Checkpoint.open(out), Checkpoint.open(tmp_path / "full")
    assert set(full.tensors) == set(back.tensors) and not full.told
    for name in full.tensors:
        assert torch.equal(full.matrix(name), back.matrix(name)), name
    api.prune(str(out), str(tmp_path / "less"), method="random", ratio=0.5)
    less = Checkpoint.open(tmp_path / "less")
    assert not less.told and sum("experts" in n for n in less.tensors) == 2 * 4 * 3


def test_without_its_config_it_is_no_checkpoint(written: Made, tmp_path: Path) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((written("llama", "gguf:f16") / "model.gguf").read_bytes())
    with pytest.raises(MoetoolError, match="config"):
        Checkpoint.open(alone)
    (tmp_path / "folder").mkdir()
    alone.rename(tmp_path / "folder" / "model.gguf")
    with pytest.raises(MoetoolError, match=r"no config\.json beside them"):
        Checkpoint.open(tmp_path / "folder")
    config = json.loads((written("qwen3", "gguf:f16") / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoetoolError):
        api.verify(str(tmp_path / "folder"))
