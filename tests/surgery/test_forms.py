"""Every form is read as transformers reads it; what is only moved keeps its bytes, and what is
computed is written so that a loader understands it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
import tiny
import torch
from conftest import command, tree
from forward.test_walk import SHAPES, apart, batches
from methods.test_profiles import ids

import moetool as api
from moetool import methods
from moetool.errors import MoetoolError
from moetool.forward import block as blocks
from moetool.forward.walk import Budget, Walk
from moetool.methods.contract import Settings
from moetool.methods.reduce.decided import read as read_decided
from moetool.methods.reduce.view import Eye, View
from moetool.surgery import forms, ops, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import Piece, Stored, Target, rows

Made = Callable[..., Path]
QUANTIZED = ("deepseek_v3", "gpt_oss")


@pytest.fixture(scope="session")
def quantized(models: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """quantized("deepseek_v3") -> the tiny model in fp8 (or gpt_oss in mxfp4), made once."""
    root, made = tmp_path_factory.mktemp("quantized"), {}

    def get(family: str, **overrides: Any) -> Path:
        key = f"{family}-{len(overrides)}"
        if key not in made:
            if family == "gpt_oss":
                source = models(family, intermediate_size=96, **overrides)
                made[key] = packed.save_mxfp4(source, root / key)
            else:
                source = models(family, **({"moe_intermediate_size": 64} | overrides))
                made[key] = packed.save_fp8(source, root / key)
        return made[key]

    return get


# Kills the process when it gives the second shard its name.
KILLED = """
import os, signal, sys
left, real = [2], os.replace
def replace(*args, **kwargs):
    left[0] -= str(args[1]).endswith(".safetensors")
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    real(*args, **kwargs)
os.replace = replace
from moetool.cli import main
sys.exit(main(sys.argv[1:]))
"""


def text(folder: Path) -> dict[str, Any]:
    """Options that send text through a tiny model."""
    return {"calibrate": [str(ids(folder))], "tokens": 600, "seq_len": 40, "pack": False}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter as stock transformers loads it, in float32, with empty loading info."""
    return dict(tiny.load(folder).named_parameters())


def test_the_forms_there_are() -> None:
    assert list(forms.forms()) == [
        "bitnet",
        "bnb_int8",
        "factored",
        "fp4",
        "fp8",
        "fp8_block",
        "fp8_ct_block",
        "full",
        "gguf",
        "in_gguf",
        "in_rows",
        "int8_activations",
        "kbit",
        "lora",
        "mxfp4",
        "mxfp4_packed",
        "mxfp8",
        "nf4",
        "nvfp4",
        "packed_asym",
        "packed_int",
        "sparse",
        "ternary",
    ]
    with pytest.raises(MoetoolError, match="no form 'fp8_blok'"):
        forms.named("fp8_blok")


CASES = [
    ("full", {}, (96, 64), 16),
    ("fp8_block", {"block": [32, 32], "scale": "F32", "power": False}, (96, 64), 8 + 32 / 1024),
    ("fp8_block", {"block": [128, 128], "scale": "BF16", "power": False}, (130, 5), None),
    ("mxfp4", {}, (4, 64, 40), 4.25),
    ("packed_int", {"bits": 4, "group": 32}, (96, 64), 4 + 16 / 32 + 128 / (96 * 64)),
    ("packed_int", {"bits": 3, "group": 0}, (96, 64), None),
    ("nf4", {"double": False}, (96, 64), 4 + 32 / 64 + 8 * (4 * 16 + 78) / (96 * 64)),
    ("fp4", {"double": True}, (6, 320), None),
    ("bnb_int8", {}, (96, 64), 8 + 32 / 64 + 8 / (96 * 64)),
    ("factored", {"rank": 8}, (96, 64), 16 + 16 * 8 * 160 / (96 * 64)),
]


@pytest.mark.parametrize(("name", "params", "shape", "bits"), CASES)
def test_parts_bits_and_shapes(
    name: str, params: dict[str, Any], shape: tuple[int, ...], bits: float | None
) -> None:
    """A form's parts are what its encoder makes and its decoder takes."""
    form = forms.named(name)
    target = Target("model.layers.0.mlp.experts.3.up_proj.weight", "F32", shape)
    parts = form.parts(target, params)
    if bits is not None:
        assert form.bits(shape, params) == pytest.approx(bits)
    if name == "factored":
        with pytest.raises(MoetoolError, match="a single matrix"):
            form.encode(torch.zeros(shape), params)
        return
    made = form.encode(torch.randn(shape), params)
    assert [tuple(m.shape) for m in made] == [p.shape for p in parts]
    assert tuple(form.decode(made, params).shape) == shape


@pytest.mark.parametrize("family", QUANTIZED)
def test_read_as_transformers_reads_it(family: str, quantized: Made) -> None:
    """Every matrix, and the logits of the whole model, against stock transformers, which
    dequantizes on the CPU, and against the twin that was never quantized.
    """
    folder = quantized(family)
    source, expected = Checkpoint.open(folder), packed.values(packed.twin(folder))
    assert set(source.tensors) == set(expected)
    decoded = [n for n, t in source.tensors.items() if t.parts]
    assert len(decoded) == {"deepseek_v3": 104, "gpt_oss": 8}[family]
    for name, tensor in source.tensors.items():
        assert tensor.shape == expected[name].shape
        assert np.array_equal(source.matrix(name).numpy(), expected[name])
    theirs, twin = parameters(folder), parameters(packed.twin(folder))
    assert theirs.keys() == twin.keys()
    assert all(torch.equal(theirs[n], twin[n]) for n in twin)
    walk = Walk(source, batches(*SHAPES), Budget())
    walk.run()
    assert apart(walk, tiny.load(folder)) < 2e-6


@pytest.mark.parametrize("family", QUANTIZED)
def test_a_piece_of_a_matrix(family: str, quantized: Made) -> None:
    """Rows at the edge of a block and in its middle, entries of a stack, a run of values."""
    folder = quantized(family)
    source, expected = Checkpoint.open(folder), packed.values(packed.twin(folder))
    for name, tensor in source.tensors.items():
        if not tensor.parts:
            continue
        height = tensor.shape[0]
        for first, last in ((0, 1), (0, height), (1, height), (height // 2, height)):
            piece = rows(tensor, first, last)
            assert np.array_equal(source.matrix(piece).numpy(), expected[name][first:last])
            assert np.array_equal(source.numbers(piece), expected[name][first:last])
        run = Piece(name, (5,), 17)
        assert np.array_equal(source.matrix(run).numpy(), expected[name].reshape(-1)[17:22])


@pytest.mark.parametrize("family", QUANTIZED)
def test_looking_at_it(family: str, quantized: Made, tmp_path: Path) -> None:
    """inspect, profile and eval say of it what they say of its twin."""
    folder = quantized(family)
    seen, plain = api.inspect(str(folder)), api.inspect(str(packed.twin(folder)))
    same = ("family", "kind", "parameters", "active_parameters", "layers", "unknown_tensors")
    assert [seen[k] for k in same] == [plain[k] for k in same] and not plain["forms"]
    assert sum(seen["forms"].values()) and seen["bytes"] < plain["bytes"]
    said = command("inspect", folder).stdout
    assert all(f"{n} matrices as {form}" in said for form, n in seen["forms"].items())
    how = text(tmp_path)
    found = api.profile(str(folder), str(tmp_path / "a"), **how)
    other = api.profile(str(packed.twin(folder)), str(tmp_path / "b"), **how)
    assert found["summary"] == other["summary"]
    cut = {"text": how["calibrate"], "seq_len": 40, "pack": False}
    told = api.eval(str(folder), reference=str(packed.twin(folder)), **cut)
    assert told["perplexity"] == told["reference_perplexity"] and abs(told["kl"]) < 1e-9


def _bytes_are_those_of(folder: Path, out: Path) -> None:
    """Every part of a matrix (or its entry for one expert) stands in the source."""
    opened = Checkpoint.open(folder), Checkpoint.open(out)
    names = [
        [p.name for t in c.tensors.values() if t.parts for p in t.parts.tensors] for c in opened
    ]
    before, after = packed.values(folder), packed.values(out)
    there = {before[n].tobytes() for n in names[0]}
    there |= {entry.tobytes() for n in names[0] for entry in before[n]}
    assert len(names[1]) > 10
    for name in names[1]:
        value = after[name]
        assert value.tobytes() in there or all(entry.tobytes() in there for entry in value)


@pytest.mark.parametrize("family", QUANTIZED)
@pytest.mark.parametrize("method", ["router-distance", "reap"])
def test_pruned_it_stays_as_it_is(
    family: str, method: str, quantized: Made, tmp_path: Path
) -> None:
    """Parts of kept experts byte for byte, the config's words kept; it loads, value for value, and
    computes what the whole model does with the dropped experts masked.
    """
    folder, how = quantized(family), text(tmp_path) if method == "reap" else {}
    out = tmp_path / "out"
    report = api.prune(str(folder), str(out), method=method, ratio=0.5, **how)
    before, after = (json.loads((p / "config.json").read_text()) for p in (folder, out))
    assert after["quantization_config"] == before["quantization_config"]
    source, made = Checkpoint.open(folder), Checkpoint.open(out)
    twin = api.prune(
        str(packed.twin(folder)),
        str(tmp_path / "twin"),
        method="router-distance",
        decisions=str(out / "decisions.json"),
        ratio=0.5,
    )
    assert twin["decisions"]["layers"] == report["decisions"]["layers"]
    expected = packed.values(tmp_path / "twin")
    assert set(made.tensors) == set(expected) and made.told == source.told
    assert all(np.array_equal(made.matrix(n).numpy(), expected[n]) for n in expected)
    _bytes_are_those_of(folder, out)
    theirs, plain = parameters(out), parameters(tmp_path / "twin")
    assert all(torch.equal(theirs[n], plain[n]) for n in plain)
    assert torch.equal(tiny.logits(out), tiny.logits(tmp_path / "twin"))
    assert api.verify(str(out), against=[str(folder)], load=True)["bytes"]["computed_tensors"] == 0
    walk = Walk(made, batches(*SHAPES), Budget())
    walk.run()
    assert apart(walk, tiny.load(tmp_path / "twin")) < 2e-6
    assert report["parameters"] == twin["parameters"]


@pytest.mark.parametrize("family", QUANTIZED)
def test_what_computes_writes_full_matrices(family: str, quantized: Made, tmp_path: Path) -> None:
    """merge decodes, and so does prune --refit: the output is that of the twin, and its config
    speaks of no quantizer.
    """
    folder, how = quantized(family), text(tmp_path)
    for verb, options in (
        ("merge", {"method": "alike"}),
        ("merge", {"method": "m-smoe", **how}),
        ("prune", {"method": "reap", "refit": True, **how}),
    ):
        outs = [tmp_path / f"{verb}-{options['method']}-{side}" for side in ("a", "b")]
        for source, out in zip((folder, packed.twin(folder)), outs, strict=True):
            getattr(api, verb)(str(source), str(out), ratio=0.5, **options)
        made, expected = (packed.values(out) for out in outs)
        assert made.keys() == expected.keys()
        assert all(np.array_equal(made[n], expected[n]) for n in expected)
        configs = [(out / "config.json").read_text() for out in outs]
        assert configs[0] == configs[1] and "quantization" not in configs[0]
        tiny.load(outs[0])
        assert api.verify(str(outs[0]), against=[str(folder)])["accounted"]


@pytest.mark.parametrize("family", QUANTIZED)
@pytest.mark.parametrize("verb", ["merge", "prune"])
def test_the_same_form_again(family: str, verb: str, quantized: Made, tmp_path: Path) -> None:
    """--form same: what was computed is rounded again, what was moved keeps its bytes, the config
    says what it said, and stock transformers reads exactly that.
    """
    folder, out, full = quantized(family), tmp_path / "same", tmp_path / "full"
    refit = {"method": "reap", "refit": True, **text(tmp_path)}
    options = {"method": "alike"} if verb == "merge" else refit
    for form, place in (("same", out), ("full", full)):
        getattr(api, verb)(str(folder), str(place), ratio=0.5, form=form, **options)
    source, made, plain = Checkpoint.open(folder), Checkpoint.open(out), Checkpoint.open(full)
    assert made.told == source.told and not plain.told and set(made.tensors) == set(plain.tensors)
    theirs, again, first = parameters(out), 0, Mixture.of(source).layers[0]
    for name, tensor in made.tensors.items():
        value, computed = made.matrix(name), plain.matrix(name)
        if tensor.parts is None:
            assert torch.equal(value, computed)
            continue
        assert tensor.parts.form == source.tensors[name].parts.form
        rounded = reform.held(source.tensors[name], computed, "same")
        if verb == "prune" and f"layers.{first}." not in name:
            continue  # solved on what rounded layers below give, so not on the same numbers
        entries = zip(value, computed, rounded, strict=True)
        for mine, before, after in entries if value.dim() == 3 else [(value, computed, rounded)]:
            assert torch.equal(mine, before) or torch.equal(mine, after)
            again += not torch.equal(mine, before)
    assert again > 3 and all(torch.isfinite(v).all() for v in theirs.values())
    walk = Walk(made, batches(*SHAPES), Budget())
    walk.run()
    assert apart(walk, tiny.load(out)) < 2e-6
    assert api.verify(str(out), against=[str(folder)], load=True)["accounted"]


@pytest.mark.parametrize("family", QUANTIZED)
def test_what_is_no_longer_quantized_is_said(family: str, quantized: Made, tmp_path: Path) -> None:
    """A merged output may be larger than its source: why, and what to do about it."""
    said: dict[str, list[str]] = {}
    for form in ("auto", "same", "full"):
        told: dict[str, Any] = {"method": "alike", "ratio": 0.5, "form": form}
        made = api.merge(str(quantized(family)), str(tmp_path / form), **told)
        said[form] = [w for w in made["warnings"] if "written in full" in w]
    assert len(said["auto"]) == 1 and "--form same" in said["auto"][0]
    assert not said["same"] and not said["full"]
    moved = api.prune(str(quantized(family)), str(tmp_path / "moved"), method="random")
    assert not any("written in full" in w for w in moved["warnings"])


@pytest.mark.parametrize("family", QUANTIZED)
def test_a_walk_goes_on_with_what_will_be_written(
    family: str, quantized: Made, tmp_path: Path
) -> None:
    """The merged block in memory is the one that is read from the output."""
    folder, out = quantized(family), tmp_path / "out"
    api.merge(str(folder), str(out), method="alike", ratio=0.5, form="same")
    way = methods.make("merge", {"method": "alike", "ratio": 0.5, "form": "same"}).way
    decided = read_decided(out / "decisions.json")
    mixture, made = (Mixture.of(Checkpoint.open(f)) for f in (folder, out))
    for number in mixture.layers:
        view = View(mixture, number, Eye("alike", 0))
        new = way.block(view, decided.layers[number], blocks.read(mixture, number))
        written = blocks.read(made, number)
        for role in ("gate_up", "down", "gate_up_bias", "down_bias"):
            mine, theirs = getattr(new.experts, role), getattr(written.experts, role)
            assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_form_that_needs_a_whole_layer(quantized: Made, tmp_path: Path) -> None:
    """Base and differences cannot be made of one matrix, and only d2-moe makes them."""
    with pytest.raises(MoetoolError, match="--form factored does not go with --method alike"):
        api.merge(
            str(quantized("deepseek_v3")), str(tmp_path / "out"), method="alike", form="factored"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 4, "top_k": 2},
        {"experts": 8, "top_k": 2, "split": 4},
        {"experts": 4, "top_k": 2, "diversify": "drop:0.5"},
        {"experts": 4, "top_k": 2, "target": "qwen2_moe", "shared": True},
    ],
    ids=["copy", "split", "drop", "shared"],
)
def test_upcycled(options: dict[str, Any], quantized: Made, tmp_path: Path) -> None:
    """A dense fp8 model: copies stay fp8 and load, what is computed is written in full."""
    if "target" in options:
        folder = quantized("qwen2", num_hidden_layers=2)
    else:
        folder = quantized("qwen3", num_hidden_layers=2, head_dim=32)
    for source, out in ((folder, "a"), (packed.twin(folder), "b")):
        api.upcycle(str(source), str(tmp_path / out), **options)
    made, plain = Checkpoint.open(tmp_path / "a"), packed.values(tmp_path / "b")
    assert bool(made.told) == (options.keys() == {"experts", "top_k"})
    assert set(made.tensors) == set(plain)
    assert all(np.array_equal(made.matrix(n).numpy(), plain[n]) for n in plain)
    theirs, expected = parameters(tmp_path / "a"), parameters(tmp_path / "b")
    assert all(torch.equal(theirs[n], expected[n]) for n in expected)
    found = api.verify(str(tmp_path / "a"), against=[str(folder)], load=True)
    assert found["verified"].startswith("bytes")


@pytest.mark.parametrize(
    "options",
    [{"split": 4, "experts": 8}, {"diversify": "drop:0.5", "experts": 4}],
    ids=["split", "drop"],
)
def test_upcycled_in_the_same_form(
    options: dict[str, Any], quantized: Made, tmp_path: Path
) -> None:
    """What --split cuts and --diversify changes is rounded again; stock transformers reads it."""
    folder = quantized("qwen3", num_hidden_layers=2, head_dim=32)
    for form in ("same", "full"):
        api.upcycle(str(folder), str(tmp_path / form), top_k=2, form=form, **options)
    made, plain = (Checkpoint.open(tmp_path / f) for f in ("same", "full"))
    assert made.told and not plain.told and set(made.tensors) == set(plain.tensors)
    for name, tensor in made.tensors.items():
        value, computed = made.matrix(name), plain.matrix(name)
        assert ("_proj." in name) == (tensor.parts is not None)
        assert (value - computed).abs().max() <= computed.abs().max() / 15
    theirs = dict(tiny.load(tmp_path / "same").named_parameters())
    assert all(torch.isfinite(v).all() for v in theirs.values())
    walk = Walk(made, batches(*SHAPES), Budget())
    walk.run()
    assert apart(walk, tiny.load(tmp_path / "same")) < 2e-6


def test_blocks_at_the_edge(models: Made, tmp_path: Path) -> None:
    """576 rows in blocks of 128: the scales are five, and only the config says how high a block
    is. Stock transformers refuses such files; pruned, they keep their bytes.
    """
    folder = packed.save_fp8(models("deepseek_v3"), tmp_path / "edge", (40, 48))
    source, expected = Checkpoint.open(folder), packed.values(packed.twin(folder))
    assert all(np.array_equal(source.matrix(n).numpy(), expected[n]) for n in expected)
    walk = Walk(source, batches(*SHAPES), Budget())
    walk.run()
    assert apart(walk, tiny.load(packed.twin(folder))) < 2e-6
    api.prune(str(folder), str(tmp_path / "out"), method="router-distance", ratio=0.5)
    made = Checkpoint.open(tmp_path / "out")
    assert made.told == source.told and sum(1 for t in made.tensors.values() if t.parts) == 68
    api.merge(str(folder), str(tmp_path / "full"), method="alike", ratio=0.5)
    tiny.load(tmp_path / "full")


def test_factored_is_a_form_like_any_other(models: Made, tmp_path: Path) -> None:
    """Base and differences: pruned they stay so, merged they are full matrices again."""
    source = models("qwen3_moe")
    base = tmp_path / "base"
    api.merge(
        str(source), str(base), method="d2-moe", form="factored", ratio=0.25, **text(tmp_path)
    )
    seen = api.inspect(str(base))
    assert seen["family"] == "qwen3_moe" and seen["forms"] == {"factored": 72}
    opened = Checkpoint.open(base)
    api.prune(str(base), str(tmp_path / "pruned"), method="router-distance", ratio=0.5)
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert pruned.config["num_experts"] == 4 and pruned.told == opened.told
    assert sum(".experts.base." in n for n in pruned.stored) == 9
    walk = Walk(pruned, batches(*SHAPES), Budget())
    walk.run()
    api.merge(str(base), str(tmp_path / "merged"), method="alike", ratio=0.5)
    merged = Checkpoint.open(tmp_path / "merged")
    assert not merged.told and len(merged.tensors) == len(merged.stored)
    tiny.load(tmp_path / "merged")


def test_what_only_all_experts_together_can_be_is_not_written_again(
    models: Made, tmp_path: Path
) -> None:
    """A base that experts share counts once; and --form same keeps what is only moved."""
    base, kept = tmp_path / "base", tmp_path / "kept"
    options = {"method": "d2-moe", "form": "factored", "ratio": 0.25}
    made = api.merge(str(models("qwen3_moe")), str(base), **options, **text(tmp_path))
    pruned = api.prune(str(base), str(kept), method="random", ratio=0.5, form="same")
    assert pruned["expert_bytes_before"] == made["expert_bytes_after"]
    assert api.inspect(str(kept))["forms"] == {"factored": 36}
    with pytest.raises(MoetoolError, match="factored matrices that are computed") as error:
        api.merge(str(base), str(tmp_path / "out"), method="alike", ratio=0.5, form="same")
    assert error.value.where["expected"] == "--form full"
    assert not (tmp_path / "out").exists()


COUNTED = {  # form -> family, verb, options
    "full": ("qwen3_moe", "prune", {"method": "random"}),
    "factored": ("qwen3_moe", "merge", {"method": "d2-moe", "form": "factored"}),
    "fp8_block": ("deepseek_v3", "prune", {"method": "random"}),
    "mxfp4": ("gpt_oss", "prune", {"method": "random"}),
}


@pytest.mark.parametrize("form", COUNTED)
def test_inspect_and_the_report_count_the_same(
    form: str, models: Made, quantized: Made, tmp_path: Path
) -> None:
    """Learned numbers, all and active, by the form of the matrices: each expert of a layer that a
    token does not reach rests, and what experts share does not.
    """
    family, verb, options = COUNTED[form]
    source = (quantized if family in QUANTIZED else models)(family)
    given = text(tmp_path) if verb == "merge" else {}
    made = getattr(api, verb)(str(source), str(tmp_path / "out"), ratio=0.25, **options, **given)
    seen = api.inspect(str(tmp_path / "out"))
    assert list(seen["forms"]) == ([] if form == "full" else [form])
    keys = ("parameters", "active_parameters")
    assert [made[k] for k in keys] == [seen[k] for k in keys]
    opened = Checkpoint.open(tmp_path / "out")
    scales = ("_scale_inv", "_scales")
    packed_as = {"_blocks": 2}  # two numbers a byte
    learned = {
        name: prod(stored.shape) * packed_as.get(name[-7:], 1)
        for name, stored in opened.stored.items()
        if not name.endswith(scales)
    }
    assert made["parameters"] == sum(learned.values())
    routed = sum(n for name, n in learned.items() if re.search(r"\.experts\.(?!base)", name))
    experts = max(layer["experts"] for layer in seen["layers"])
    resting = seen["parameters"] - seen["active_parameters"]
    assert resting == routed * (experts - seen["top_k"]) // experts > 0


@pytest.mark.parametrize("uneven", ["zeroed", "ghost", "ragged"])
def test_layers_of_uneven_numbers_are_counted_the_same(
    uneven: str, models: Made, tmp_path: Path
) -> None:
    how = {"budget": "sensitivity", "uneven": uneven, "ratio": 0.4} | text(tmp_path)
    source = models("glm4_moe" if uneven == "ghost" else "deepseek_v3")  # whose router has groups
    made = api.prune(str(source), str(tmp_path / "out"), **how)
    seen = api.inspect(str(tmp_path / "out"))
    keys = ("parameters", "active_parameters")
    assert [made[k] for k in keys] == [seen[k] for k in keys]


def test_moving_imports_no_torch(quantized: Made, tmp_path: Path) -> None:
    """Pruning by router rows reads headers, and moves bytes."""
    run = (
        "import sys, moetool; moetool.prune(sys.argv[1], sys.argv[2], method='router-distance',"
        " ratio=0.5); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for family in QUANTIZED:
        out = tmp_path / family
        subprocess.run([sys.executable, "-c", run, quantized(family), out], check=True)
    dense = quantized("qwen3", num_hidden_layers=2, head_dim=32)
    run = run.replace("prune(", "upcycle(").replace(
        "method='router-distance', ratio=0.5", "experts=4"
    )
    subprocess.run([sys.executable, "-c", run, dense, tmp_path / "dense"], check=True)


@pytest.mark.parametrize("family", QUANTIZED)
def test_workers_and_resuming_change_no_byte(family: str, quantized: Made, tmp_path: Path) -> None:
    """One worker, three, and a run that goes on where one was killed."""
    folder, trees = quantized(family), []
    for number, options in enumerate(({"jobs": 1}, {"jobs": 3})):
        out = tmp_path / str(number)
        api.merge(str(folder), str(out), method="alike", ratio=0.5, max_shard=200_000, **options)
        trees.append({n: h for n, h in tree(out).items() if n.endswith(".safetensors")})
    assert trees[0] == trees[1] and len(trees[0]) > 2
    killed = tmp_path / "killed"
    options = ("--method", "alike", "--ratio", "0.5", "--max-shard-size", "200KB")
    arguments = ["merge", str(folder), str(killed), *options]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert run.returncode == -signal.SIGKILL and not killed.exists()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    found = {n: h for n, h in tree(killed).items() if n.endswith(".safetensors")}
    assert found == trees[0]


BROKEN = [
    (lambda t: t.pop("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"), "no scales"),
    (lambda t: t.pop("model.layers.1.mlp.experts.0.up_proj.weight"), "without their fp8 matrix"),
]


def stored(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    opened = Checkpoint.open(folder)
    return dict(opened.stored), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("breaking", "said"), BROKEN)
def test_a_broken_fp8_matrix_is_named(breaking: Any, said: str, quantized: Made) -> None:
    tensors, config = stored(quantized("deepseek_v3"))
    breaking(tensors)
    with pytest.raises(MoetoolError, match=said) as problem:
        forms.seen(tensors, config)
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in problem.value.where["tensor"]


def test_a_wrong_block_is_named(quantized: Made) -> None:
    """The block of the config decides, and must fit what is there."""
    tensors, config = stored(quantized("deepseek_v3"))
    config["quantization_config"]["weight_block_size"] = [64, 32]
    with pytest.raises(MoetoolError, match="do not fit its blocks") as problem:
        forms.seen(tensors, config)
    assert "[64, 32]" in problem.value.where["expected"]


def test_a_broken_mxfp4_matrix_is_named(quantized: Made) -> None:
    tensors, config = stored(quantized("gpt_oss"))
    tensors.pop("model.layers.0.mlp.experts.down_proj_scales")
    with pytest.raises(MoetoolError, match="not whole") as problem:
        forms.seen(tensors, config)
    assert problem.value.where["tensor"] == "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "fp8", "weight_block_size": None},
    ],
    ids=str,
)
def test_other_quantizers_are_not_read(said: dict[str, Any], quantized: Made) -> None:
    """Scales that no config explains are refused by name."""
    tensors, config = stored(quantized("deepseek_v3"))
    with pytest.raises(MoetoolError, match="does not say what this part"):
        forms.seen(tensors, config | {"quantization_config": said})


def test_nan_in_fp8_is_found(models: Made, tmp_path: Path) -> None:
    folder = packed.save_fp8(models("deepseek_v3", moe_intermediate_size=64), tmp_path / "nan")
    path = folder / "model.safetensors"
    entry = packed.header(path)["model.layers.1.mlp.experts.0.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + entry["data_offsets"][0] + 7] = 0xFF
    path.write_bytes(data)
    report = api.prune(str(folder), str(tmp_path / "out"), method="router-distance", ratio=0.01)
    assert any("NaN" in str(w) for w in report["warnings"]), report["warnings"]


@pytest.mark.parametrize("family", QUANTIZED)
def test_the_promise_counts_decoded_bytes(family: str, quantized: Made, tmp_path: Path) -> None:
    """What an operation holds are matrices in float32, not the bytes that were read."""
    source, tasks = Checkpoint.open(quantized(family)), {}
    for form in ("full", "same"):
        method = methods.make("merge", {"method": "alike", "ratio": 0.5, "form": form})
        settings = Settings(work=str(tmp_path))
        made = method.plan((source,), method.decide((source,), settings), settings)
        tasks[form] = made.plan.tasks
        dtypes = {n: t.dtype for n, t in made.plan.targets.items()}
        for task in made.plan.tasks:
            held = sum(4 * prod(e["shape"]) for e in task.params.get("decode") or () if e)
            written = sum(4 * prod(e["shape"]) for e in task.params.get("encode") or () if e)
            if held:
                promised = ops.task_memory(task, dtypes, lambda p: source.range_of(p)[2])
                assert promised >= held + max(written // 3, 1)
    assert any(t.op == "reform" for t in tasks["full"])
    assert any("encode" in t.params for t in tasks["same"])
