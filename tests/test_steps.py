"""Recipes of several steps: the bytes of one verb after the other, no model in between, and a record
that `verify` can follow back to the first source.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import inside, tree
from every.test_faults import KILLER
from safetensors.torch import load_file

import moetool
from moetool import pipeline
from moetool.errors import UsageError, VerificationFailed
from moetool.methods.certificates import weakest
from moetool.methods.contract import Certificate
from moetool.recipe import read

ROOT = Path(__file__).resolve().parents[1]
Steps = list[tuple[str, dict[str, Any]]]
PRUNE = ("prune", {"ratio": 0.5, "method": "router-distance"})  # nothing runs
INT8 = ("quantize", {"format": "int8/channel", "method": "rtn", "loader-check": False})
CASES: dict[str, tuple[str, Steps]] = {
    "prune, quantize": ("mixtral", [PRUNE, INT8]),
    "merge, quantize": ("mixtral", [("merge", {"ratio": 0.5, "method": "alike"}), INT8]),
    "upcycle, prune, quantize": (
        "llama",
        [
            ("upcycle", {"experts": 4, "diversify": "noise:0.1"}),
            ("prune", {"ratio": 0.25, "method": "router-distance"}),
            INT8,
        ],
    ),
    "quantize, prune": ("qwen3_moe", [INT8, PRUNE]),
    "prune, stack": ("mixtral", [PRUNE, ("convert-layout", {"to": "fused"})]),
    "stack, prune": ("mixtral", [("convert-layout", {"to": "fused"}), PRUNE]),
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token ids: tiny models have no tokenizer."""
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    rows = ([dice.randrange(10, 150) for _ in range(64)] for _ in range(24))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


def solved(text: str) -> Steps:
    """A first step that solves for weights."""
    cut = {"calibrate": [text], "tokens": 1024, "seq-len": 64, "sample": 128, "refit-tokens": 512}
    return [("prune", {"ratio": 0.5, "refit": True, **cut}), INT8]


def recipe(folder: Path, steps: Steps) -> Path:
    """The steps as a file."""
    path = folder / "recipe.yaml"
    made = {"steps": [{"method": m, "options": o} for m, o in steps], "source": None, "out": None}
    path.write_text(yaml.safe_dump(made | {"paper": "none", "about": "a test"}))
    return path


def one_by_one(source: Path, folder: Path, steps: Steps, **common: Any) -> Path:
    """The same verbs with a model after each."""
    for number, (method, options) in enumerate(steps):
        out = folder / f"step{number}"
        verb = getattr(moetool, method.replace("-", "_"))
        verb(
            str(source), str(out), **{k.replace("-", "_"): v for k, v in options.items()}, **common
        )
        source = out
    return source


def weights(folder: Path) -> dict[str, str]:
    return {n: h for n, h in tree(folder).items() if "safetensors" in n or n == "config.json"}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_one_after_the_other(
    case: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    family, steps = CASES[case]
    source, out = models(family), tmp_path / "out"
    common = {"max_shard_size": 100_000}
    report = moetool.run(str(recipe(tmp_path, steps)), source=str(source), out=str(out), **common)
    assert weights(out) == weights(one_by_one(source, tmp_path, steps, **common))
    assert [s["method"] for s in report["steps"]] == [m for m, _ in steps[:-1]]
    assert not list(tmp_path.glob(".out*")), "a work folder stayed"
    found = moetool.verify(str(out), against=[str(source)], load=False)
    assert found["verified"] == "bytes" and len(found["steps"]) == len(steps) - 1
    assert "sealed_tensors" not in found["bytes"]


def test_only_what_is_computed_is_written_in_between(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a pruned model that is its routers; the experts are read where they lie."""
    source = models("mixtral")
    said = read(recipe(tmp_path, CASES["prune, quantize"][1]), [f"source={source}", "out=x"])
    prepared = pipeline.prepare(said.options({"dry_run": True}))
    shown, (first,) = prepared.sources[0], prepared.before
    *_, rest = shown.under
    assert shown.fingerprint() and len(shown.under) == 2
    assert set(rest.tensors) == {n for n in first.plan.targets if n.endswith("gate.weight")}
    assert sum(size for size, _ in rest.files.values()) < 0.05 * first.plan.disk
    lying = shown.tensors.items()
    own = {os.path.realpath(shown.place(t).path) for n, t in lying if n not in rest.tensors}
    assert own == {str(p.resolve()) for p in source.glob("*.safetensors")}


@pytest.mark.parametrize("shared", [False, True])
def test_a_later_step_reads_the_further_models_again(
    shared: bool, models: Callable[..., Path], tmp_path: Path
) -> None:
    """BAM, whole: attentions and FFNs of each model, the mean of all else."""
    paths = [models("llama", seed=n) for n in range(4)]
    file, more = ROOT / "recipes" / "upcycle" / "bam.yaml", [str(p) for p in paths[1:]]
    told = {"from_": more, "1.attention-shared-kv": shared}
    report = moetool.run(str(file), source=str(paths[0]), out=str(tmp_path / "out"), **told)
    assert report["certificate"]["level"] == "none"
    made = load_file(tmp_path / "out" / "model.safetensors")
    each = [load_file(p / "model.safetensors") for p in paths]
    own = ["q_proj", "o_proj"] if shared else ["q_proj", "k_proj", "v_proj", "o_proj"]
    parts = [("self_attn.experts", own), ("mlp.ffns", ["gate_proj", "up_proj", "down_proj"])]
    layers = json.loads((paths[0] / "config.json").read_text())["num_hidden_layers"]
    left = {n for n in made if "router" not in n}
    for (site, linears), layer, number in product(parts, range(layers), range(4)):
        for one in linears:
            name = f"model.layers.{layer}.{site}.{number}.{one}.weight"
            theirs = name.replace(f"{site}.{number}", site.partition(".")[0])
            assert torch.equal(made[name], each[number][theirs])
            left.remove(name)
    assert {n.split(".")[-2] for n in left} == {
        *("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"),
        *({"k_proj", "v_proj"} if shared else ()),
    }
    for name in left:
        mean = torch.stack([one[name].double() for one in each]).mean(0)
        assert torch.equal(made[name], mean.float())
    found = moetool.verify(str(tmp_path / "out"), against=[*map(str, paths)], load=False)
    assert found["verified"] == "bytes" and len(found["steps"]) == 1
    again = moetool.run(str(file), source=str(paths[0]), out=str(tmp_path / "out"), **told)
    assert "already there" in again["warnings"][0]
    with pytest.raises(VerificationFailed):  # another fine-tune than the one that it was made of
        moetool.verify(str(tmp_path / "out"), against=[*map(str, paths[:3]), str(paths[0])])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"from": True}, "step 1: unknown key 'from'"),
        ({"from": "x"}, "step 2: from='x' is not true or false"),
    ],
)
def test_from_of_a_step_is_read_strictly(step: dict[str, Any], words: str, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [{"method": "upcycle"}, {"method": "prune"}]
    steps[int(words[5]) - 1] |= step
    said = {"steps": steps, "source": "a", "out": "b", "from": ["c"]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(UsageError) as refused:
        read(tmp_path / "r.yaml", [])
    assert words in str(refused.value)


def test_what_a_step_solved_is_sealed(
    text: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("mixtral"), tmp_path / "out"
    file = str(recipe(tmp_path, solved(text)))
    stages: list[str] = []
    said = read(file, [f"source={source}", f"out={out}"]).options()
    caller = pipeline.Caller(lambda stage, done, total: stages.append(stage.name))
    pipeline.write(pipeline.prepare(said, caller), caller)
    assert {s.partition(":")[0] for s in stages if ": " in s} == {"1/2 prune", "2/2 quantize"}
    assert weights(out) == weights(one_by_one(source, tmp_path, solved(text)))
    found = moetool.verify(str(out), against=[str(source)], load=False)
    assert found["bytes"]["sealed_tensors"] > 0 and found["verified"] == "bytes"
    again = moetool.run(file, source=str(source), out=str(out))
    assert "already there" in again["warnings"][0]


@pytest.mark.parametrize("case", ["bytes", "source", "plan", "record"])
def test_verify_follows_the_steps_back(
    case: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("mixtral"), tmp_path / "out"
    steps = CASES["prune, quantize"][1]
    moetool.run(str(recipe(tmp_path, steps)), source=str(source), out=str(out))
    record = json.loads((out / "moetool.json").read_text())
    words = {"bytes": "not what the plan", "source": "not the source", "plan": "another plan"}
    words["record"] = "record of moetool"
    if case == "bytes":
        file = out / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
    elif case == "source":
        source = models("mixtral", seed=1)
    elif case == "plan":
        record["before"][0]["decisions"]["layers"] = {
            n: {**layer, "keep": [0, 1]}
            for n, layer in record["before"][0]["decisions"]["layers"].items()
        }
    else:
        del record["before"][0]["tables"]
    if case in ("plan", "record"):
        (out / "moetool.json").write_text(json.dumps(record))
    with pytest.raises(moetool.MoetoolError, match=words[case]):
        moetool.verify(str(out), against=[str(source)], load=False)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_rename_it_goes_on(
    when: str, text: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """In either step, and while the output is written: the bytes of an undisturbed run."""
    source, out = models("mixtral"), tmp_path / "out"
    words = ["run", recipe(tmp_path, solved(text)), "--set", f"source={source}"]
    whole = tmp_path / "whole"
    assert inside(*words, "--set", f"out={whole}", "-q").returncode == 0
    kills = 0
    for at in (1, 5, 8, 9, 10, 11, 14, 17):
        out = tmp_path / str(at)
        args = [*map(str, words), "--set", f"out={out}", "-q"]
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", KILLER, *args],
            env={**os.environ, "KILL_AT": str(at), "KILL_WHEN": when},
            capture_output=True,
            check=False,
        )
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
        kills += 1
        assert inside(*args).returncode == 0
        assert weights(out) == weights(whole) and not list(tmp_path.glob(f".{at}*"))
    assert kills >= 5


def test_stopped_in_the_first_step(text: str, models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = models("mixtral"), tmp_path / "out"
    said = read(recipe(tmp_path, solved(text)), [f"source={source}", f"out={out}"]).options()
    stop = threading.Event()

    def tell(stage: Any, done: int, total: int) -> None:
        if stage.unit == "layers" and done:
            stop.set()

    with pytest.raises(moetool.MoetoolError, match="stopped"):
        pipeline.prepare(said, pipeline.Caller(tell, stop))
    assert not out.exists()
    pipeline.write(pipeline.prepare(said))
    assert weights(out) == weights(one_by_one(source, tmp_path, solved(text)))


def test_a_gate_is_the_last_steps_and_holds_the_output_against_the_source(
    text: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("mixtral"), tmp_path / "out"
    file = str(recipe(tmp_path, CASES["prune, quantize"][1]))
    gate = {"text": [text], "text-tokens": 512, "seq-len": 64}
    report = moetool.run(file, source=str(source), out=str(out), **gate)
    from_source = moetool.eval(
        str(out), reference=str(source), text=(text,), tokens=512, seq_len=64
    )
    assert report["quality"]["kl"] == pytest.approx(from_source["kl"], rel=1e-4)
    with pytest.raises(VerificationFailed, match="KL"):
        moetool.run(file, source=str(source), out=str(tmp_path / "b"), **gate, **{"max-kl": 1e-9})
    assert not (tmp_path / "b").exists()
    early: Steps = [("prune", {"max-kl": 0.1, "calibrate": [text]}), INT8]
    with pytest.raises(UsageError, match=r"step 1 \(prune\) has a gate"):
        moetool.run(str(recipe(tmp_path, early)), source=str(source), out=str(tmp_path / "c"))


def test_set_reaches_the_steps(models: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe(tmp_path, CASES["prune, quantize"][1])
    found = read(
        file,
        ["source=a", "out=b", "tokens=512", "ratio=0.25", "2.format=int4", "prune.seq-len=32"],
    )
    prune, quantize = found.options().before[0], found.options()
    assert prune.values == {**PRUNE[1], "ratio": 0.25, "tokens": 512, "seq-len": 32}
    assert quantize.values == {**INT8[1], "format": "int4", "tokens": 512}
    with pytest.raises(UsageError, match="no step 'prnue'"):
        read(file, ["prnue.ratio=0.5"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: []\n", ["steps needs a list"]),
        ("steps: [prune]\n", ["steps needs a list"]),
        ("steps:\n- {method: prnue}\n", ["step 1", "did you mean prune"]),
        ("steps:\n- {method: prune, optoins: {}}\n", ["step 1: unknown key", "options"]),
        ("steps:\n- {method: prune, options: {ratoi: 1}}\n", ["step 1: prune", "ratio"]),
        ("steps:\n- {method: prune}\nmethod: prune\n", ["method stands beside steps"]),
    ],
)
def test_mistakes_in_steps(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{text}source: a\nout: b\n")
    with pytest.raises(UsageError) as refused:
        read(tmp_path / "r.yaml", [])
    assert all(w in str(refused.value) for w in words), str(refused.value)


def test_the_screen_says_every_step(models: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe(tmp_path, CASES["prune, quantize"][1])
    out = tmp_path / "out"
    done = inside("run", file, "--set", f"source={models('mixtral')}", "--set", f"out={out}")
    assert done.returncode == 0 and "step 1       prune to" in done.stdout
    assert "step 2       quantize" in done.stdout
    checked = inside("verify", out, "--against", models("mixtral"), "--no-load")
    assert "step 1       prune, planned again" in checked.stdout
    card = (out / "README.md").read_text()
    assert "- prune\n- quantize\n" in card and "prune first: " in card


def test_the_weakest_certificate_holds() -> None:
    exact, none = Certificate("exact", "a"), Certificate("none", "b", None)
    assert weakest([exact]) is exact
    assert weakest([none, exact]) == Certificate("none", "b; then a", None)
