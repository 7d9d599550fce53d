"""Budgets, protection, decisions and options of prune and merge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_profiles import ids

import moetool as api
from moetool import methods
from moetool.methods import described
from moetool.methods.merge.parts import group
from moetool.methods.merge.way import MergeWay
from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce import budget, decided, protect
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.decision import Decision
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.units import parse_share


def mixture(models: Callable[..., Path], family: str = "mixtral") -> Mixture:
    return Mixture.of(Checkpoint.open(models(family)))


def test_every_method_is_named_where_people_look() -> None:
    """Options, help and README name what there is; a new file in the folder shows up by itself."""
    assert sorted(PruneWay.known()) == [
        "ean",
        "easy-ep",
        "frequency",
        "gate-mass",
        "mone",
        "naee",
        "random",
        "reap",
        "router-distance",
        "stun",
        "svd",
    ]
    assert sorted(MergeWay.known()) == [
        "alike",
        "d2-moe",
        "hc-smoe",
        "m-smoe",
        "mergemoe",
        "ream",
        "sub-moe",
        "sub-moe-whitened",
    ]
    for verb, names in (("prune", PruneWay.known()), ("merge", MergeWay.known())):
        text = next(o["help"] for o in described.describe(verb)["options"] if o["name"] == "method")
        assert all(n in text for n in names)
        assert all(len(c.__doc__ or "") > 60 for c in names.values())


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_every_option_is_on_the_command_line(verb: str, moetool: Callable[..., Any]) -> None:
    text = moetool(verb, "--help").stdout
    fields = [f.spelled for f in methods.load(verb).fields()]
    assert len(fields) > 20 and all(f"--{name}" in text for name in fields)


def test_uniform_budget_floors(models: Callable[..., Path]) -> None:
    m = mixture(models)
    assert [budget.uniform(m, r) for r in (0.0, 0.1, 0.125, 0.25, 0.5, 0.74)] == [8, 8, 7, 6, 4, 3]
    with pytest.raises(api.UsageError, match="share of experts removed"):
        budget.uniform(m, 1.0)


def test_sensitivity_takes_from_where_it_is_missed_least(models: Callable[..., Path]) -> None:
    scores = {
        0: np.array([1, 1, 1, 1, 1, 1, 1, 1.0]),
        1: np.array([100, 100, 100, 0.1, 0.1, 0.1, 0.1, 0.1]),
        2: np.ones(8),
        3: np.ones(8),
    }
    made = budget.across(mixture(models), 0.25, scores, "sensitivity")
    assert sum(made.values()) == 24 and made[1] == 3 and min(made.values()) >= 2
    scores[3] = np.full(8, 0.05)  # as they are, its experts are the least of all
    assert budget.across(mixture(models), 0.25, scores, "global") == {0: 8, 1: 6, 2: 8, 3: 2}


def test_super_experts_are_those_of_the_paper() -> None:
    """|max| above the 99.5th percentile and a tenth of the largest, in a layer that forms massive
    activations and in the first 75 % of all layers, by real layer number.
    """
    dice = np.random.default_rng(0)
    largest = {n: dice.uniform(0.1, 1, 128) for n in range(3, 48)}  # three dense layers first
    largest[3][7], largest[5][100], largest[40][1] = 5000.0, 900.0, 9000.0
    peaks = protect.super_experts(largest, {}, 48)
    assert protect.by_layer(peaks) == {3: [7], 5: [100]}
    rest = max(float(np.sort(a)[-2]) for a in largest.values())
    assert [p.times for p in peaks] == pytest.approx([5000 / rest, 900 / rest], rel=1e-3)
    streams = {n: np.array([4.0, 1.0]) for n in largest}
    for number in range(3, 40):  # made in layers 3 and 5, and handed on
        streams[number] = np.array([5000.0 if number < 5 else 6000.0, 0.9])
    peaks = protect.super_experts(largest, streams, 48)
    assert protect.by_layer(peaks) == {3: [7], 5: [100]}
    streams[5][0] = 5000.0
    assert protect.by_layer(protect.super_experts(largest, streams, 48)) == {3: [7]}
    assert protect.super_experts({}, {}, 4) == ()


def test_the_largest_by_a_hair_is_no_super_expert() -> None:
    """Of 64 experts one always lies above the 99.5th percentile."""
    largest = {n: np.random.default_rng(n).uniform(0.9, 1, 16) for n in range(4)}
    (peak,) = protect.super_experts(largest, {n: np.array([3.0, 1.0]) for n in range(4)}, 4)
    assert not peak.super and 1.0 < peak.times < 1.1
    assert peak.output == max(float(a.max()) for n, a in largest.items() if n < 3)
    assert protect.by_layer([peak]) == {}


def test_protected_experts_stay(models: Callable[..., Path], tmp_path: Path) -> None:
    """A super expert by construction: two huge rows of its down_proj, whose numbers stand out in
    the residual stream.
    """
    from safetensors.torch import load_file, save_file

    folder = models("mixtral")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.6.w2.weight"][[5, 17]] *= 1e5
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text((folder / "config.json").read_text())
    text = ids(tmp_path)
    options = {"calibrate": [str(text)], "tokens": 800, "seq_len": 40, "ratio": 0.5}
    kept = api.prune(str(tmp_path / "m"), str(tmp_path / "a"), method="random", seed=1, **options)
    assert (
        kept["protected"] == {"1": [6]}
        and 6 in kept["decisions"]["layers"]["1"]["keep"]
        and kept["decisions"]["layers"]["1"]["protected"] == [6]
    )
    (peak,) = kept["largest_outputs"]
    assert peak["super"] and peak["times"] > 100 and (peak["layer"], peak["expert"]) == (1, 6)
    plain = api.prune(str(folder), str(tmp_path / "p"), method="random", seed=1, **options)
    assert not plain["protected"] and not plain["largest_outputs"][0]["super"]
    seeds = [
        api.prune(
            str(tmp_path / "m"),
            str(tmp_path / f"b{s}"),
            method="random",
            seed=s,
            protect=False,
            **options,
        )
        for s in range(4)
    ]
    assert any(6 not in r["decisions"]["layers"]["1"]["keep"] for r in seeds) and all(
        "protected" not in r or not r["protected"] for r in seeds
    )
    merged = api.merge(str(tmp_path / "m"), str(tmp_path / "c"), method="hc-smoe", **options)
    assert [6] in merged["decisions"]["layers"]["1"]["groups"]


def test_without_text_the_user_is_told(models: Callable[..., Path], tmp_path: Path) -> None:
    still: dict[str, Any] = {"method": "router-distance"}
    assert any(
        "super experts were not looked for" in w
        for w in api.prune(str(models("mixtral")), str(tmp_path / "a"), **still)["warnings"]
    )
    assert not api.prune(str(models("mixtral")), str(tmp_path / "b"), protect=False, **still)[
        "warnings"
    ]


def test_decisions_are_written_edited_and_replayed(
    models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    source, file = models("mixtral"), tmp_path / "d.json"
    still = ["--method", "router-distance"]
    dry = moetool(
        "prune", source, tmp_path / "out", *still, "--ratio", 0.25, "--dry-run", "--decisions", file
    )
    assert (
        dry.returncode == 0
        and file.exists()
        and not (tmp_path / "out").exists()
        and "nothing was written" in dry.stdout
    )
    data = json.loads(file.read_text())
    data["layers"]["2"]["keep"] = [0, 1, 2, 3, 4, 7]
    file.write_text(json.dumps(data))
    done = moetool("prune", source, tmp_path / "out", "--decisions", file, "--json")
    assert done.returncode == 0, done.stderr
    assert done.json["decisions"]["layers"]["2"]["keep"] == [0, 1, 2, 3, 4, 7]
    again = api.prune(
        str(source), str(tmp_path / "again"), decisions=str(tmp_path / "out" / "decisions.json")
    )
    assert again["plan_digest"] == done.json["plan_digest"]
    text = ids(tmp_path)
    first = api.merge(
        str(source),
        str(tmp_path / "m1"),
        method="m-smoe",
        calibrate=[str(text)],
        tokens=400,
        seq_len=40,
        refit=False,
    )
    replay = api.merge(
        str(source),
        str(tmp_path / "m2"),
        method="m-smoe",
        decisions=str(tmp_path / "m1" / "decisions.json"),
    )
    assert first["plan_digest"] == replay["plan_digest"]


@pytest.mark.parametrize(
    ("verb", "family", "options"),
    [
        ("prune", "qwen3_moe", {"method": "stun", "total_sparsity": 0.5}),
        ("prune", "gpt_oss", {"method": "mone"}),
        ("merge", "qwen3_moe", {"method": "sub-moe-whitened"}),
        ("prune", "qwen3_moe", {"method": "reap", "refit": True}),
    ],
    ids=["stun", "mone", "whitened", "refit"],
)
def test_decisions_that_need_numbers_too(
    verb: str, family: str, options: dict[str, Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    """Plans that read statistics are replayed with the same text, and without it refused with a
    sentence.
    """
    source, text = (
        str(models(family)),
        {"calibrate": [str(ids(tmp_path))], "tokens": 400, "seq_len": 40, "sample": 200},
    )
    first = getattr(api, verb)(source, str(tmp_path / "first"), **options, **text)
    file = str(tmp_path / "first" / "decisions.json")
    again = getattr(api, verb)(source, str(tmp_path / "again"), decisions=file, **options, **text)
    assert (
        again["decisions"]["layers"] == first["decisions"]["layers"]
        and again["plan_digest"] == first["plan_digest"]
    )
    with pytest.raises(api.UsageError, match="needs text"):
        getattr(api, verb)(source, str(tmp_path / "none"), decisions=file, **options)


WRONG: list[tuple[Any, str]] = [
    ([1], "not a file of decisions"),
    ({"schema": 1, "layers": {}}, "how many experts"),
    ({"schema": 1, "experts": 8, "layers": {"x": {"keep": [0]}}}, "not a number"),
    ({"schema": 1, "experts": 8, "layers": {"0": {"kept": [0]}}}, "did you mean keep"),
    ({"schema": 1, "experts": 8, "layers": {"0": {"keep": [9]}}}, "do not fit"),
    ({"schema": 1, "experts": 8, "layers": {"0": {"keep": [1, 1]}}}, "do not fit"),
    ({"schema": 1, "experts": 8, "layers": {"0": {"keep": ["a"]}}}, "malformed"),
    (
        {"schema": 1, "experts": 8, "layers": {"0": {"groups": [[0, 1]], "weights": [[0.5]]}}},
        "do not match",
    ),
    (
        {"schema": 1, "experts": 8, "layers": {"0": {"groups": [[0, 1]], "weights": [[0.5, 0.4]]}}},
        "sum to 1",
    ),
    (
        {"schema": 1, "experts": 8, "layers": {"0": {"groups": [[0, 1]], "orders": {"1": [0, 0]}}}},
        "no permutation",
    ),
    ({"schema": 1, "experts": 8, "layers": {"0": {"groups": [[]]}}}, "do not fit"),
]


@pytest.mark.parametrize(("data", "said"), WRONG)
def test_wrong_decisions(data: Any, said: str) -> None:
    with pytest.raises(api.UsageError) as refused:
        Decided.from_json(data, "d.json")
    assert said in str(refused.value) and "d.json" in str(refused.value)


def test_decisions_of_another_model_or_too_few(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match="no decisions here"):
        decided.read(tmp_path / "none.json")

    def keep(n, layers=range(4)):
        return {
            "schema": 1,
            "experts": 8,
            "layers": {str(i): {"keep": list(range(n))} for i in layers},
        }

    for data, said in ((keep(6, range(3)), "another model"), (keep(1), "too few experts")):
        (tmp_path / "d.json").write_text(json.dumps(data))
        with pytest.raises(api.MoetoolError, match=said):
            api.prune(
                str(models("mixtral")), str(tmp_path / "out"), decisions=str(tmp_path / "d.json")
            )
    ragged = keep(6)
    ragged["layers"]["1"] = {"keep": [0, 1, 2]}
    (tmp_path / "d.json").write_text(json.dumps(ragged))
    told = {"decisions": str(tmp_path / "d.json"), "uneven": "uniform"}
    with pytest.raises(api.UsageError, match="different numbers"):
        api.prune(str(models("mixtral")), str(tmp_path / "out"), **told)


def test_rendered_decisions_are_json_a_layer_a_line() -> None:
    made = Decided(
        "merge",
        "x",
        4,
        {
            0: Decision(((0, 2), (1,)), ((0.5, 0.5), (1.0,)), orders={2: (1, 0)}),
            7: Decision.keep([3, 1]),
        },
    )
    text = decided.render(made.as_json())
    assert (
        Decided.from_json(json.loads(text)).with_orders(made.tables())
        == dataclasses.replace(made, layers={n: layer.sorted() for n, layer in made.layers.items()})
        and text.count("\n") == 6
    )
    assert made.layers[0].map(4) == [0, 1, 0, None] and made.layers[7].leads == [1, 3]


def test_lists_for_servers_name_every_expert_once() -> None:
    made = Decided("prune", "reap", 4, {3: Decision.keep([0, 2], scores=(0.5, 0.1, 0.9, 0.2))})
    lists = decided.experts_lists(made)
    assert json.loads(lists["experts.json"])["layers"] == {"3": {"kept": [0, 2], "pruned": [1, 3]}}
    assert [json.loads(line) for line in lists["experts.jsonl"].splitlines()] == [
        {"3": [2, 0, 3, 1]}
    ]


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("prune", {"ratio": 1.0}, "0 <= ratio < 1"),
        ("prune", {"ratio": 25}, "0 <= ratio < 1"),
        ("prune", {"method": "reep"}, "did you mean reap"),
        ("prune", {"method": "reap"}, "needs text"),
        ("prune", {"calibrate": "a", "stats": "b"}, "exclude each other"),
        ("prune", {"budget": "sensitivity", "uneven": "uniform"}, "zeroed, ghost or ragged"),
        ("prune", {"uneven": "raged"}, "not known"),
        ("prune", {"layout": "raged"}, "not known"),
        ("prune", {"layout": "ghost", "uneven": "ragged"}, "different things"),
        ("prune", {"total_sparsity": 0.5}, "belong together"),
        ("prune", {"method": "stun"}, "belong together"),
        (
            "prune",
            {"method": "stun", "ratio": 0.5, "total_sparsity": 0.4, "calibrate": "x"},
            "above the share",
        ),
        ("prune", {"max_perplexity_increase": "much"}, "not a percentage"),
        ("prune", {"refit": True, "method": "random"}, "needs text"),
        ("prune", {"seq_len": 1}, "at least 2"),
        ("prune", {"max_kl": -1.0}, "not negative"),
        ("merge", {"combine": "meen"}, "not known"),
        ("merge", {"method": "hcsmoe"}, "did you mean hc-smoe"),
        ("merge", {"rank_energy": 0.0}, "above 0"),
        ("merge", {"method": "hc-smoe"}, "needs text"),
        ("merge", {"method": "d2-moe", "refit": True, "calibrate": "x"}, "keeps every expert"),
        ("merge", {"whiten": "maybe"}, "not known"),
        ("prune", {"propagate": True, "stats": "STATS"}, "sends text"),
    ],
)
def test_wrong_options(
    verb: str, options: dict[str, Any], said: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    if options.get("stats") == "STATS":
        api.profile(
            str(models("mixtral")),
            str(tmp_path / "stats"),
            calibrate=[str(ids(tmp_path))],
            tokens=400,
            seq_len=40,
        )
        options = {**options, "stats": str(tmp_path / "stats")}
    with pytest.raises(api.MoetoolError) as refused:
        getattr(api, verb)(str(models("mixtral")), str(tmp_path / "out"), **options)
    assert said in str(refused.value) and refused.value.hint


def test_percent() -> None:
    assert parse_share("2%") == 0.02 and parse_share("0.02") == 0.02


def test_joint_clusters_come_home_in_the_right_number() -> None:
    points = np.random.default_rng(1).standard_normal((8, 3))
    for start in (
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[i] for i in range(8)],
        [[0], [1, 2, 3], [4, 5, 6, 7]],
    ):
        made = group._adjusted([list(g) for g in start], points, 4, 0)
        assert len(made) == 4 and sorted(e for g in made for e in g) == list(range(8))
