"""`verify` finds whatever was changed, names it, and finds nothing where nothing was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moetool
from moetool import VerificationFailed
from moetool.evaluate import gate, structure
from moetool.evaluate import verify as verifying
from moetool.methods.options import Gate
from moetool.surgery import spellings
from moetool.surgery.checkpoint import Checkpoint

MADE: dict[str, dict[str, Any]] = {
    "copies": {"experts": 4},
    "shared": {"experts": 4, "shared": True, "split": 2, "target": "glm4_moe"},
    "scaled": {"experts": 4, "split": 4, "top_k": 4, "scale": "auto"},
    "fused": {"experts": 4, "layout": "fused"},
    "drawn": {"experts": 4, "diversify": "permute+drop:0.5", "router": "normal:0.02"},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One output of each kind, made once."""
    root = tmp_path_factory.mktemp("outputs")

    def get(kind: str) -> Path:
        if not (root / kind).exists():
            moetool.upcycle("demo", str(root / kind), **MADE[kind])
        return root / kind

    return get


@pytest.fixture
def copy(outputs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """An output of a kind, to be damaged."""
    return lambda kind: Path(shutil.copytree(outputs(kind), tmp_path / kind))


GREEDY = {"relative": 1e-6, "max_logit": 5.0, "greedy_tokens": 40}
WORDS = [
    # certificate, the limit, the same words, a tie: whether it fails
    ("exact", verifying.EXACT, False, False, True),
    ("exact", verifying.EXACT, False, True, False),
    ("exact", verifying.EXACT, True, False, False),
    ("exact", verifying.ROUNDED, False, False, False),
    ("exact_if", verifying.EXACT, False, False, False),
    ("none", verifying.EXACT, False, False, False),
]


@pytest.mark.parametrize(("level", "limit", "same", "tie", "fails"), WORDS)
def test_other_greedy_tokens_fail_where_the_certificate_is_exact(
    level: str,
    limit: float,
    same: bool,
    tie: bool,
    fails: bool,
    copy: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = GREEDY | {"same_greedy": same, "greedy_tie": tie}
    out = Checkpoint.open(copy("copies"))
    if not fails:
        verifying._check_logits(found, out, limit, level)
        return
    with pytest.raises(VerificationFailed, match="other words"):
        verifying._check_logits(found, out, limit, level)
    monkeypatch.setattr(verifying.logits, "compare_logits", lambda *a, **k: found)
    with pytest.raises(VerificationFailed, match="other words"):
        moetool.verify(out.folder, against=["demo"], load=True)


def verify(folder: Path) -> dict[str, Any]:
    return moetool.verify(str(folder), against=["demo"], load=False)


@pytest.mark.parametrize("kind", MADE)
def test_what_is_whole_is_found_whole(kind: str, outputs: Callable[[str], Path]) -> None:
    found = verify(outputs(kind))
    exact = found["certificate"]["level"].startswith("exact")
    assert found["verified"] == ("bytes and function" if exact else "bytes")
    counted = found["bytes"]
    assert counted["copied_ranges"] > 20 and len(counted["copied_sha256"]) == 64
    assert counted["computed_tensors"] > 0, "the router at least"
    assert found["accounted"]["tensors_used"] == 38 and found["accounted"]["tensors_dropped"] == 0


def test_structure_alone_needs_no_source(outputs: Callable[[str], Path]) -> None:
    found = moetool.verify(str(outputs("copies")))
    assert found["verified"] == "structure" and "bytes" not in found
    assert found["structure"]["tensors"] == len(Checkpoint.open(outputs("copies")).tensors)


WORDS = {
    "an expert": "experts.2.",
    "a router": "gate.weight",
    "attention": "self_attn.k_proj",
    "a norm": "input_layernorm",
    "embeddings": "embed_tokens",
}


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("what", WORDS)
@pytest.mark.parametrize("kind", ["copies", "shared", "drawn"])
def test_one_bit_of_any_tensor(
    kind: str, what: str, where: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(kind)
    tensors = [t for n, t in Checkpoint.open(folder).tensors.items() if WORDS[what] in n]
    stored = tensors[-1]
    at = {"first": 0, "middle": (stored.stop - stored.start) // 2, "last": -1}[where]
    position = (stored.stop if at < 0 else stored.start) + at
    path = folder / stored.file
    with path.open("r+b") as file:
        file.seek(position)
        (old,) = file.read(1)
        file.seek(position)
        file.write(bytes([old ^ 1]))
    with pytest.raises(VerificationFailed, match="bytes are not what the plan makes") as found:
        verify(folder)
    assert found.value.where["tensor"] == stored.name and found.value.where["file"] == str(path)
    assert moetool.verify(str(folder))["verified"] == "structure", "headers are as they were"


def test_a_hole_that_should_be_zero(copy: Callable[[str], Path]) -> None:
    """Routed experts beside a shared one start at zero output."""
    folder = copy("shared")
    zero = next(
        t for n, t in Checkpoint.open(folder).tensors.items() if ".experts.0.down_proj" in n
    )
    with (folder / zero.file).open("r+b") as file:
        file.seek(zero.stop - 1)
        file.write(b"\x01")
    with pytest.raises(VerificationFailed) as found:
        verify(folder)
    assert "zeros" in found.value.where["expected"]


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of the one file; the header keeps the plan's digest."""
    record = json.loads((folder / "moetool.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    words = {"format": "pt", "moetool_plan": record["report"]["plan_digest"]}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", words)


NORM = "model.layers.1.input_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config changed": (
        lambda f: edit(f, "config.json", lambda c: c.update(rope_theta=1.0)),
        "config.json was changed",
    ),
    "digest changed": (
        lambda f: edit(f, "moetool.json", lambda r: r["report"].update(plan_digest="0" * 64)),
        "a shard is not of this plan",
    ),
    "tensor gone": (
        lambda f: rewrite(f, lambda t: t.pop(NORM)),
        "number of tensors is not the planned one",
    ),
    "tensor renamed": (
        lambda f: rewrite(f, lambda t: t.update({"model.what.weight": t.pop(NORM)})),
        "a tensor that the family needs is missing",
    ),
    "shape changed": (
        lambda f: rewrite(f, lambda t: t.update({NORM: t[NORM][:64]})),
        "a tensor has a wrong shape",
    ),
    "seed changed": (
        lambda f: edit(f, "moetool.json", lambda r: r.update(seed=1)),
        "the same command now makes another plan",
    ),
    "options changed": (
        lambda f: edit(f, "moetool.json", lambda r: r["options"].update(router="zero")),
        "the same command now makes another plan",
    ),
    "record gone": (lambda f: (f / "moetool.json").unlink(), "not written by moetool"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_exchanged(fault: str, copy: Callable[[str], Path]) -> None:
    folder = copy("drawn")
    change, said = FAULTS[fault]
    change(folder)
    with pytest.raises(VerificationFailed, match=said) as found:
        verify(folder)
    assert found.value.exit_code == 4 and found.value.hint


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_stacked_experts_are_measured_too(part: str, copy: Callable[[str], Path]) -> None:
    folder = copy("fused")
    name = next(n for n in Checkpoint.open(folder).tensors if n.endswith(f"experts.{part}"))
    rewrite(folder, lambda t: t.update({name: t[name][:3]}))
    with pytest.raises(VerificationFailed, match="wrong shape"):
        moetool.verify(str(folder))


def test_the_names_of_a_checkpoint_of_others(models: Callable[..., Path], tmp_path: Path) -> None:
    """Any checkpoint can be held against its family's layout."""
    assert structure.check_names(Checkpoint.open(models("qwen3_moe"))) > 50
    folder = Path(shutil.copytree(models("qwen3_moe"), tmp_path / "x"))
    edit(folder, "config.json", lambda c: c.update(num_hidden_layers=5))
    with pytest.raises(VerificationFailed, match="missing") as found:
        structure.check_names(Checkpoint.open(folder))
    assert "layers.4." in found.value.where["tensor"]


def test_other_sources_are_refused(
    outputs: Callable[[str], Path], models: Callable[..., Path]
) -> None:
    with pytest.raises(VerificationFailed, match="not the source it was made from"):
        moetool.verify(str(outputs("copies")), against=[str(models("llama"))], load=False)


def test_a_source_may_have_moved(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    """Headers and sizes tell a source, not its folder."""
    from moetool.demo import MODEL

    other = shutil.copytree(MODEL, tmp_path / "elsewhere")
    found = moetool.verify(str(outputs("copies")), against=[str(other)], load=False)
    assert found["verified"] == "bytes and function"


FOUND = {"kl": 0.2, "perplexity_increase": 0.05}


@pytest.mark.parametrize(
    ("kl", "increase", "said"),
    [
        (0.0, None, ""),
        (0.2, 0.05, ""),
        (0.3, 0.1, ""),
        (0.19, None, "KL divergence"),
        (0.0, 0.049, "perplexity increase"),
        (0.1, 0.01, "KL divergence"),
    ],
)
def test_gates(kl: float, increase: float | None, said: str) -> None:
    if not said:
        gate.check(FOUND, Gate(kl, increase), "out")
        return
    with pytest.raises(VerificationFailed, match=said) as missed:
        gate.check(FOUND, Gate(kl, increase), "out")
    assert (
        missed.value.where["expected"].startswith("at most ")
        and "raise the gate" in missed.value.hint
    )


@pytest.mark.parametrize("name", ["kl", "perplexity_increase"])
def test_what_is_no_number_passes_no_gate(name: str) -> None:
    with pytest.raises(VerificationFailed):
        gate.check(FOUND | {name: float("nan")}, Gate(9.0, 9.0), "out")


def _shape_of_another(tensors: dict[str, Any], config: dict[str, Any]) -> str:
    name = next(n for n in tensors if n.endswith("weight_shape"))
    tensors[name][1] += 32
    return name


def _no_scale(value: float) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    def damage(tensors: dict[str, Any], config: dict[str, Any]) -> str:
        name = [n for n in tensors if n.endswith("weight_scale")][-1]
        tensors[name][3, 0] = value
        return name

    return damage


def _told_otherwise(**said: Any) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    def damage(tensors: dict[str, Any], config: dict[str, Any]) -> str:
        group = config["quantization_config"]["config_groups"]["group_0"]
        (group if "format" in said else group["weights"]).update(said)
        return "config.json"

    return damage


PARTS = {
    "shape": _shape_of_another,
    "nan": _no_scale(float("nan")),
    "inf": _no_scale(float("-inf")),
    "bits": _told_otherwise(num_bits=8),
    "group": _told_otherwise(group_size=64),
    "format": _told_otherwise(format="int-quantized"),
}


@pytest.mark.parametrize("fault", PARTS)
def test_parts_of_packed_matrices(fault: str, tmp_path: Path) -> None:
    """Without the source, by what is small."""
    out = tmp_path / "out"
    moetool.quantize("demo", str(out), format="int4/32", loader_check=False)
    assert moetool.verify(str(out))["verified"] == "structure"
    file = out / "model.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors, config = load_file(file), json.loads((out / "config.json").read_text())
    where = PARTS[fault](tensors, config)
    save_file(tensors, file, said)
    if where == "config.json":
        (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match="was changed") as problem:
        moetool.verify(str(out))
    assert problem.value.exit_code == 4
    assert problem.value.where.get("tensor", "config.json") == where


def test_outputs_from_before_configs_were_spelled_for_every_client(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older config says the same in fewer words; one that says something else is another plan."""
    source, out = str(models("qwen3_moe")), tmp_path / "out"
    with monkeypatch.context() as before:
        before.setattr(spellings, "completed", lambda config: config)
        moetool.convert_layout(source, str(out), to="fused")
    config = json.loads((out / "config.json").read_text())
    assert "rope_theta" not in config and config["rope_parameters"]["rope_theta"]
    assert (
        moetool.verify(str(out), against=[source], load=False)["verified"] == "bytes and function"
    )
    with monkeypatch.context() as other:
        other.setattr(spellings, "completed", lambda config: config | {"hidden_act": "gelu"})
        moetool.convert_layout(source, str(tmp_path / "else"), to="fused")
    with pytest.raises(VerificationFailed, match="another plan"):
        moetool.verify(str(tmp_path / "else"), against=[source], load=False)
