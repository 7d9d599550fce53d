"""Every recipe opens with the command that runs it, runs, and plans what its golden file says.

A change that alters a plan rewrites the file: `python tests/every/test_recipes.py`, and the commit
says why.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from modeling import stacks
from safetensors.torch import save_file

import moetool
from moetool import pipeline
from moetool.demo import MODEL, TEXT
from moetool.recipe import read

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden"
NAMES = {
    "gw-redundancy",
    "sparse-upcycling",
    "moe-llava",
    "llava-mod",
    "nvidia-virtual-groups",
    "dynamic-dino",
    "drop-upcycling",
    "btx",
    "uni-moe",
    "clip-moe-assembly",
    "factorllm-split",
    "deepseekmoe-segmentation",
    "qwen-fine-grained",
    "unival-interpolation",
    "shared-expert",
    "llava-mole",
    "mixlora",
    "mote",
    "ders",
    "moextend",
    "ders-sparse",
    "ders-bits",
    "rocket",
    "instructvla",
    "awaker",
    "lavin",
    "pill",
    "moe-x",
    "evomoe",
    "llama-moe-v1",
    "llama-moe-v2",
    "reap",
    "reap-global",
    "stun",
    "super-experts-only",
    "naee",
    "easy-ep",
    "deepspeed-expert-pruning",
    "sub-moe",
    "sub-moe-whitened",
    "hc-smoe",
    "m-smoe",
    "ream",
    "d2-moe",
    "svd-clustering",
    "svd-features",
    "int8",
    "int4-rtn",
    "int4-gptq",
    "int3-experts",
    "fp8",
    "mxfp4",
    "nf4",
    "gguf-q4_0",
    "fit-6gb",
    "prune-then-quantize",
    "mono-internvl",
    "moma",
    "mode",
    "nexus",
    "dmoerm",
    "moiie",
    "pesc",
    "mofme",
    "mote-int4",
    "mot",
    "moh",
    "parrot",
    "bam",
    "mixture-of-mamba",
    "uoe",
    "mono-internvl-1.5",
    "clip-moe",
    "robust-qa-switch",
    "sparse-upcycling-vit",
    "cmoe",
    "llama-moe-v2-residual",
}
REDUCED = ("prune", "merge")
SMALLER = {r for r in RECIPES if r.parent.name in ("prune", "merge", "quantize", "extend")}
CALIBRATED = {r for r in SMALLER if "calibrate=TEXT" in r.read_text()}
# What else a recipe is told, so that it fits the embedded model.
SMALL = {
    "cmoe": [f"calibrate={TEXT}", "tokens=4096", "seq-len=256"],
    "llama-moe-v2-residual": [f"calibrate={TEXT}", "tokens=2048", "seq-len=256"],
    "instructvla": ["rank=8"],
    "awaker": ["rank=8", "prompt-from=7", "prompt-until=9"],
    "parrot": ["adapter-dim=16"],
    "pill": ["modality-ids=5"],
    "fit-6gb": ["target-size=2MB", "fit-tokens=256"],
    "gw-redundancy": ["modality-ids=512-523", "anchors=40"],
    "mono-internvl": ["modality-ids=5"],
    "moiie": ["modality-ids=5"],
    "moma": ["modality-ids=5"],
    "mot": ["modality-ids=5"],
    "mixture-of-mamba": ["modality-ids=5"],
    "mono-internvl-1.5": ["modality-ids=5"],
    "robust-qa-switch": ["layers=1"],
    "sparse-upcycling-vit": ["experts=4"],
}


@lru_cache(maxsize=1)
def mixture() -> Path:
    """A trained MoE with unlike experts: the embedded model with half of each copy's neurons drawn
    anew.
    """
    folder = Path(tempfile.mkdtemp()) / "moe"
    moetool.upcycle(str(MODEL), str(folder), experts=8, diversify="drop:0.5", router="normal:0.02")
    return folder


@lru_cache(maxsize=1)
def mote() -> Path:
    """What its own recipe makes of the embedded model."""
    folder = Path(tempfile.mkdtemp()) / "mote"
    moetool.run(str(ROOT / "recipes/upcycle/mote.yaml"), source=str(MODEL), out=str(folder))
    return folder


def small(family: str) -> Path:
    """A tiny random model of a family."""
    sys.path.append(str(ROOT / "tests"))  # where this file is run by itself
    from modeling import grown

    return grown.base(family, Path(tempfile.mkdtemp()) / family)


@lru_cache(maxsize=4)
def stack(name: str) -> Path:
    """A model with another stack than one of text."""
    return stacks.BY_NAME[name].save(Path(tempfile.mkdtemp()) / name)


# Recipes whose source is of moetool's own model type, or of a family of theirs.
OWN = {
    "mote-int4": mote,
    "clip-moe": partial(stack, "clip-text"),
    "robust-qa-switch": partial(stack, "distilbert-text"),
    "sparse-upcycling-vit": partial(stack, "vit-vision"),
    "mixture-of-mamba": partial(small, "mamba"),
    "parrot": partial(small, "llava"),
    "lavin": partial(small, "llava"),
}


def changes(recipe: Path, out: Path) -> list[str]:
    """The --set arguments of the recipe's own command, with the embedded model for every model and
    the embedded text for every text.
    """
    if recipe in SMALLER:
        text = [f"calibrate={TEXT}", "tokens=4096", "seq-len=256"] if recipe in CALIBRATED else []
        reducing = ["sample=512", "refit-tokens=4096"] if recipe.parent.name in REDUCED else []
        more = SMALL.get(recipe.stem, [])
        if recipe.parent.name == "quantize":
            more = [*more, "loader-check=false"]  # tests/evaluate does that
        source = OWN.get(recipe.stem, mixture)()
        return [f"source={source}", f"out={out}", *text, *reducing, *more]
    words = shlex.split(recipe.read_text().splitlines()[0].removeprefix("# "))
    found = [words[i + 1] for i, w in enumerate(words) if w == "--set"]
    models = next((f.partition("=")[2].split(",") for f in found if f.startswith("from=")), [])
    return [
        f"source={OWN[recipe.stem]() if recipe.stem in OWN else MODEL}",
        f"out={out}",
        *([f"from={','.join([str(MODEL)] * len(models))}"] if models else []),
        *([f"domains={domains()}"] if any(f.startswith("domains=") for f in found) else []),
        *([f"vectors={codebook()}"] if any(f.startswith("vectors=") for f in found) else []),
        *SMALL.get(recipe.stem, ()),
    ]


@lru_cache(maxsize=1)
def domains() -> Path:
    """Embeddings of three domains."""
    file = Path(tempfile.mkdtemp()) / "domains.safetensors"
    save_file({"domains": torch.eye(3)}, file)
    return file


@lru_cache(maxsize=1)
def codebook() -> Path:
    """Vectors of 12 tokens."""
    file = Path(tempfile.mkdtemp()) / "codes.safetensors"
    save_file({"codes": torch.randn(12, 3, generator=torch.Generator().manual_seed(0))}, file)
    return file


def plan(recipe: Path, out: Path) -> Any:
    found = read(recipe, changes(recipe, out))
    return pipeline.prepare(found.options({"dry_run": True})).plan


def rendered(recipe: Path, out: Path) -> str:
    """The plan as text. What was decided on text depends on a machine's last bits, so there only
    the kinds of tasks are golden.
    """
    text = plan(recipe, out).render()
    if recipe not in CALIBRATED:
        return text
    lines = [
        re.sub(r"\[[\d., e-]*\d\.\d[\d., e-]*\]|(?<=: )\d+\.\d+", "~", line)
        for line in text.splitlines()[1:]
        if not line.startswith("drop ")
    ]
    lines = [
        re.sub(
            r'"(members|rank)": \d+|"align": \[.*?\]',
            "~",
            re.sub(r"\b\d+:[\w.#-]+ \[[^]]*\](, )?", "", re.sub(r"^\d+ x ", "", line)),
        )
        for line in lines
    ]
    return "\n".join(sorted(set(lines))) + "\n"


def test_all_recipes_are_here() -> None:
    assert {r.stem for r in RECIPES} == NAMES and len(RECIPES) == 77 and len(CALIBRATED) == 19
    assert {g.stem for g in GOLDEN.glob("*.txt")} == NAMES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_golden_plan(recipe: Path, tmp_path: Path) -> None:
    assert rendered(recipe, tmp_path / "out") == (GOLDEN / f"{recipe.stem}.txt").read_text()


def test_about_names_the_code_and_says_what_is_exact() -> None:
    code = r"[Nn]o (official )?code|\b[Cc]ode\b[^.]*?[\w-]+/[\w.-]+|official: [\w-]+/"
    for recipe in RECIPES:
        data = yaml.safe_load(recipe.read_text())
        said = f"{data['paper']} {data['about']}"
        assert re.search(code, said), f"{recipe.stem}: which official code, or none found"
        assert re.search(r"\b([Ee]xact(ly)?|[Aa]pproximate|[Uu]nknown)\b", said), recipe.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_its_command_runs_and_verifies(
    recipe: Path, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    first, *rest = recipe.read_text().splitlines()
    assert first.startswith(
        f"# moetool run {recipe.relative_to(ROOT)} --set source=SRC --set out=OUT"
    )
    data = yaml.safe_load("\n".join(rest))
    assert data["paper"] and len(data["about"]) > 50
    sets = [x for c in changes(recipe, tmp_path / "out") for x in ("--set", c)]
    done = moetool("run", recipe, *sets, "--json")
    assert done.returncode == 0, done.stderr
    sources = [x for name in done.json["sources"] for x in ("--against", name)]
    checked = moetool("verify", tmp_path / "out", *sources, "--json", "--no-load")
    assert checked.returncode == 0, checked.stderr
    assert checked.json["verified"].startswith("bytes")


def test_a_value_can_be_changed(tmp_path: Path) -> None:
    report = moetool.run(
        str(ROOT / "recipes" / "upcycle" / "sparse-upcycling.yaml"),
        source=str(MODEL),
        out=str(tmp_path / "out"),
        experts=4,
        layers="all",
    )
    assert report["experts"] == 4 and report["layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: upcycle\nsource: a\nout: b\nexperts: 3\n", ["unknown key 'experts'"]),
        (
            "method: upcycle\noptions: {expert: 3}\n",
            ["source is not set", "out is not set", "no option 'expert'", "did you mean experts"],
        ),
        ("method: upcicle\nsource: a\nout: b\n", ["did you mean upcycle"]),
        ("method: upcycle\nsource: a\nout: b\nfrom: []\n", ["from needs"]),
        ("method: upcycle\nsource: a\nout: b\nseed: x\n", ["seed='x'"]),
        ("- a\n", ["not a mapping"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_mistakes_are_all_said_at_once(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(moetool.UsageError) as refused:
        read(tmp_path / "r.yaml", [])
    assert all(w in str(refused.value) for w in words) and refused.value.hint


def test_missing_recipe_and_bad_set(tmp_path: Path) -> None:
    with pytest.raises(moetool.UsageError, match="no such recipe"):
        read(tmp_path / "none.yaml", [])
    with pytest.raises(moetool.UsageError, match="no value"):
        read(RECIPES[0], ["source"])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path in RECIPES:
        (GOLDEN / f"{path.stem}.txt").write_text(rendered(path, Path(tempfile.mkdtemp()) / "out"))
