"""Every option together with every other, pairwise, on a tiny model: each case works, or is refused
with a next step; and whoever leaves out what a refusal names gets to a command that works.

The cases come from the registry: a new option, choice or way is tried by itself, and an option
without values here fails. tests/slow.py says which cases always run.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
from conftest import Done, inside

from moetool import methods
from moetool.demo import MODEL, TEXT
from moetool.methods.options import Common, Field, fields

VERBS = ("upcycle", "prune", "merge")
LIMIT = 10.0  # seconds of one command
WRITTEN = 3  # one case of so many is written and verified, the others are dry runs

# What every case says, so that it is over soon; a value of VALUES takes its place.
BASE: dict[str, str] = {
    "calibrate": "@text",
    "tokens": "512",
    "seq_len": "64",
    "sample": "128",
    "refit_tokens": "256",
}
# Sensible values beside the default. @NAME is a file that `Bench` makes; choices come from the
# registry. Of one verb alone: VERB.NAME.
VALUES: dict[str, tuple[str, ...]] = {
    "ratio": ("0", "0.5"),
    "decisions": ("@decisions",),
    "upcycle.calibrate": ("@text",),
    "calibrate": ("", "@lines.jsonl:0.5 @text:0.5"),
    "stats": ("@stats",),
    "tokens": ("300",),
    "seq_len": ("32",),
    "text_field": ("words",),
    "batch_tokens": ("100",),
    "sample": ("0", "64"),
    "refit_tokens": ("100",),
    "own_share": ("0", "0.2"),
    "max_kl": ("0.000001", "1000"),
    "max_perplexity_increase": ("0.5",),
    "text": ("@text", "@lines.jsonl @text"),
    "text_tokens": ("200", "512"),
    "total_sparsity": ("0.6",),
    "rank_energy": ("0.5",),
    "density": ("0.5",),
    "experts": ("4", "6"),
    "rank": ("4",),
    "alpha": ("8",),
    "adapter_dim": ("8",),
    "adapter_groups": ("2",),
    "adapter_residual": ("0.1",),
    "scale_group": ("128",),
    "top_k": ("1", "4"),
    "capacity": ("1",),
    "noise_dim": ("8",),
    "classifier_depth": ("3",),
    "classifier_width": ("8",),
    "pass_weight": ("0.25",),
    "linears": ("q_proj",),
    "name": ("images",),
    "gate_noise": ("0.1",),
    "prompt_from": ("7",),
    "prompt_until": ("9",),
    "patch": ("4",),
    "shared_heads": ("1",),
    "active_heads": ("2",),
    "delta_bits": ("4",),
    "delta_group": ("64",),
    "delta_keep": ("0.1",),
    "tasks": ("2",),
    "neurons": ("0,1,2,3,4,5,6,7",),
    "temperature": ("0.5",),
    "least_weight": ("0",),
    "top_p": ("0.5",),
    "split": ("2", "4"),
    "layers": ("none", "every:2"),
    "target": ("mixtral", "qwen3_moe", "same"),
    "upcycle.router": ("zero", "normal:0.02", "kaiming", "uniform:0.02", "group:0.02"),
    "carve": ("random", "shuffled", "kmeans:gate", "activation", "importance"),
    "carve_shared": ("1",),
    "carve_marks": ("4",),
    "diversify": ("permute", "noise:0.01", "drop:0.5+permute"),
    "scale": ("1", "2.5"),
    "trunk": ("mean", "weights:0.5,0.5", "interp:0.5"),
    "expert_map": ("0,1,0,1,0,1,0,1", "0,1,1,0"),
    "from_": ("@other",),
    "seed": ("7",),
    "jobs": ("1", "3"),
    "memory": ("2GB",),
    "max_shard_size": ("1MB",),
}
# Options that no pair has, and why.
LEFT_OUT = {
    "dry_run": "the battery says which cases are written",
    "device": "cuda is refused without a GPU whatever else is said (below)",
    "engine": "a cluster takes seconds to start (tests/surgery has it)",
    "ray_address": "does nothing without engine",
    "from_adapters": "another source; tests/methods/test_adapters.py has it",
    "modality_ids": "stands with the modality key alone; tests/modeling/test_other_experts.py has it",
    "domains": "a file of numbers; tests/modeling/test_routes.py has it",
    "allowed": "stands with the modality key alone; tests/modeling/test_other_experts.py has it",
}
FROM = Field("from_", tuple, (), "fine-tunes", unit="whole")
GATES = ["max_kl", "max_perplexity_increase"]
Case = dict[str, str]
Pair = frozenset[tuple[str, str]]


def options(verb: str) -> tuple[Field, ...]:
    """Every option of a verb."""
    more = (FROM,) if verb == "upcycle" else ()
    return (*methods.load(verb).fields(), *fields(Common), *more)


def based(verb: str, name: str) -> str:
    """What a case says of an option unless it tries another value; text is read by one way of
    upcycle alone.
    """
    return BASE.get(name, "") if verb != "upcycle" else ""


def values(verb: str, option: Field) -> list[str]:
    """What an option is tried with; first what is said if nothing is."""
    base = based(verb, option.name)
    if option.type is bool:
        return [base, "false" if option.default else "true"]
    if option.choices:
        return [base, *(c for c in option.choices if c != option.default)]
    own = VALUES.get(f"{verb}.{option.name}") or VALUES.get(option.name, ())
    return [base, *own]


@cache
def cases(verb: str) -> tuple[Case, ...]:
    """A greedy array that covers every pair of values; always the same."""
    tried = {f.name: values(verb, f) for f in options(verb) if f.name not in LEFT_OUT}
    left: dict[Pair, None] = {}
    for (a, of_a), (b, of_b) in combinations(tried.items(), 2):
        left |= {frozenset({(a, x), (b, y)}): None for x, y in product(of_a, of_b)}
    made = []
    while left:
        case = dict(next(iter(left)))
        for name in (n for n in tried if n not in case):
            case[name] = max(tried[name], key=lambda v, n=name: _new(case, (n, v), left))
        for pair in combinations(case.items(), 2):
            left.pop(frozenset(pair), None)
        made.append({n: case[n] for n in tried})
    return tuple(made)


def _new(case: Case, item: tuple[str, str], left: Mapping[Pair, None]) -> int:
    return sum(frozenset({item, other}) in left for other in case.items())


def battery() -> list[object]:
    """verb, number; every so many of a verb run by default."""
    made = []
    for verb in VERBS:
        count = len(cases(verb))
        often = max(1, count // 18)
        for n in range(count):
            word = "few" if n % often == 0 else "rest"
            made.append(pytest.param(verb, n, id=f"{verb}-{n}-{word}"))
    return made


@dataclass(frozen=True)
class Bench:
    """The models and files that cases name."""

    folder: Path

    def source(self, verb: str) -> Path:
        return MODEL if verb == "upcycle" else self.folder / "moe"

    def words(self, verb: str, case: Case) -> list[str]:
        """A case as a command line says it."""
        known = {f.name: f for f in options(verb)}
        said: list[str] = []
        for name, value in case.items():
            field = known[name]
            if field.type is bool and value:
                said.append(f"--{'' if value == 'true' else 'no-'}{field.spelled}")
            elif value:
                spelled = [self.place(verb, part) for part in value.split(" ")]
                for part in spelled:
                    said += [f"--{field.spelled}", part]
        return said

    def place(self, verb: str, value: str) -> str:
        if not value.startswith("@"):
            return value
        name, colon, share = value[1:].partition(":")
        where = {
            "text": str(self.folder / "text.txt"),
            "decisions": str(self.folder / f"{verb}.json"),
        }
        return where.get(name, str(self.folder / name)) + colon + share


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A small mixture, statistics of it, decisions on it, and a text with a field."""
    made = Bench(tmp_path_factory.mktemp("pairs"))
    moe, text = made.folder / "moe", made.folder / "lines.jsonl"
    lines = TEXT.read_text().splitlines()[:80]
    (made.folder / "text.txt").write_text("\n".join(lines))
    text.write_text("".join(json.dumps({"text": x, "words": x}) + "\n" for x in lines))
    how = ["--experts", 4, "--diversify", "drop:0.5", "--router", "uniform:0.02"]
    cut = ["--calibrate", TEXT, "--tokens", 512, "--seq-len", 64]
    runs = [
        ["upcycle", MODEL, moe, *how],
        ["profile", moe, made.folder / "stats", *cut, "--sample", 256, "--covariance"],
    ]
    for verb in ("prune", "merge"):
        file = made.folder / f"{verb}.json"
        runs.append([verb, moe, made.folder / "none", *cut, "--decisions", file, "--dry-run"])
    for words in runs:
        done = inside(*words)
        assert done.returncode == 0, done.stderr
    shutil.copytree(MODEL, made.folder / "other")
    _change(made.folder / "other" / "model.safetensors")
    return made


def _change(file: Path) -> None:
    """Other weights under the same header."""
    from safetensors.torch import load_file, save_file

    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_values(verb: str) -> None:
    for option in options(verb):
        tried = values(verb, option)
        known = option.name in LEFT_OUT or len(tried) > 1
        assert known, f"{verb} --{option.spelled}: give it values in VALUES"
    names = {name for v in VERBS for name in (f.name for f in options(v))}
    told = {name.rpartition(".")[2] for name in (*VALUES, *BASE, *LEFT_OUT)}
    assert told <= names, told - names


@pytest.mark.parametrize(("verb", "number"), battery())
def test_pairwise(verb: str, number: int, bench: Bench, tmp_path: Path) -> None:
    case, out = dict(cases(verb)[number]), tmp_path / "out"
    more = [] if number % WRITTEN == 0 else ["--dry-run"]
    for _ in range(len(case)):
        words = [verb, bench.source(verb), out, *bench.words(verb, case), *more]
        done = _run(words)
        if done.returncode == 0:
            break
        assert not out.exists(), words
        named = GATES if done.returncode == 4 else _named(verb, case, done.stderr)
        assert named, f"it does not say what to leave out:\n{done.stderr}\n{done.args}"
        case |= {name: based(verb, name) for name in named}
    assert done.returncode == 0, (done.args, done.stderr)
    if not more:
        _verify(out, words, bench, verb)


# Beside --calibrate, unless they say --stats: what once failed, or must be refused before work.
WORKING = (
    ("merge", "--method", "sub-moe-whitened", "--propagate"),
    ("merge", "--method", "sub-moe-whitened", "--refit"),
    ("merge", "--method", "sub-moe-whitened", "--stats", "@stats", "--refit"),
    ("merge", "--method", "d2-moe", "--combine", "least-squares"),
    ("merge", "--method", "d2-moe", "--combine", "mean", "--propagate"),
)
REFUSED = (
    ("prune", "--method", "stun", "--total-sparsity", "0.5", "--propagate"),
    ("prune", "--method", "mone", "--propagate"),
    ("prune", "--method", "mone", "--refit"),
)


@pytest.mark.parametrize("said", WORKING, ids=" ".join)
def test_together_they_work(said: tuple[str, ...], bench: Bench, tmp_path: Path) -> None:
    verb, *given = (bench.place(said[0], word) for word in said)
    words = [verb, bench.source(verb), tmp_path / "out", *given, *_cut(bench, given)]
    done = _run(words)
    assert done.returncode == 0, done.stderr
    _verify(tmp_path / "out", words, bench, verb)


@pytest.mark.parametrize("said", REFUSED, ids=" ".join)
def test_together_they_are_refused(said: tuple[str, ...], bench: Bench, tmp_path: Path) -> None:
    verb, *given = said
    done = _run([verb, bench.source(verb), tmp_path / "out", *given, *_cut(bench, given)])
    assert done.returncode == 2 and "leave out --propagate and --refit" in done.stderr
    assert not list(tmp_path.iterdir())


def _cut(bench: Bench, given: list[str]) -> list[str]:
    text = {} if "--stats" in given else {"calibrate": BASE["calibrate"]}
    return bench.words("merge", BASE | {"calibrate": ""} | text)


@pytest.mark.parametrize("verb", VERBS)
def test_a_device_that_is_not_there(verb: str, bench: Bench, tmp_path: Path) -> None:
    done = _run([verb, bench.source(verb), tmp_path / "out", "--device", "cuda:99"])
    assert done.returncode != 0 and "cuda" in done.stderr and not list(tmp_path.iterdir())


def _run(words: list[object]) -> Done:
    """One command: over in time, and right or refused with a next step."""
    begun = time.process_time()
    done = inside(*words)
    took = time.process_time() - begun
    assert took < LIMIT, (took, done.args)
    assert "a bug in moetool" not in done.stderr, (done.args, done.stderr)
    assert done.returncode in (0, 1, 2, 4), (done.args, done.stderr)
    assert done.returncode == 0 or "next:" in done.stderr, (done.args, done.stderr)
    return done


def _named(verb: str, case: Case, said: str) -> list[str]:
    """Options of the case that a refusal names: in its sentence, or else below it."""
    told = {n.rstrip("_").replace("_", "-"): n for n, v in case.items() if v != based(verb, n)}
    sentence, _, below = said.partition("\n")
    for part in (sentence, below):
        found = [told[w] for w in re.findall(r"--(?:no-)?([a-z][a-z-]*)", part) if w in told]
        if found:
            return found
    return [n for n, v in case.items() if v != based(verb, n) and _holds(below, v)]


def _holds(said: str, value: str) -> bool:
    """Whether a refusal says a value, where it names no option."""
    return len(value) > 3 and re.search(rf"\b{re.escape(value)}\b", said) is not None


def _verify(out: Path, words: list[object], bench: Bench, verb: str) -> None:
    against = [bench.source(verb)]
    if "--from" in words:
        against.append(bench.folder / "other")
    said = [word for model in against for word in ("--against", model)]
    done = _run(["verify", out, *said, "--no-load"])
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    shutil.rmtree(out)
