"""Every way of reducing experts, by its registry: what it says of itself holds, and its options are
its own. A new way is a new file, and is tried here by itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from methods.test_profiles import ids
from safetensors.torch import load_file, save_file

import moetool as api
from moetool import methods
from moetool.errors import MoetoolError
from moetool.methods.merge.combine import COMBINE
from moetool.methods.merge.way import MergeWay
from moetool.methods.options import PANELS
from moetool.methods.options import fields as fields_of
from moetool.methods.prune import stun
from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce import beside
from moetool.methods.reduce.asked import Asked
from moetool.methods.reduce.decide import bounds, choose, mixture_of, replayed, solve
from moetool.methods.reduce.decide import statistics as look
from moetool.methods.reduce.decided import ORDERS, Decided
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.way import Way, auto_help
from moetool.surgery import companions, tables
from moetool.surgery.checkpoint import Checkpoint

WAYS = [(verb, way) for verb in ("prune", "merge") for way in methods.load(verb).ways().values()]
NAMED = pytest.mark.parametrize(("verb", "way"), WAYS, ids=[f"{v}-{w.name}" for v, w in WAYS])
# What a way must be told beside its name.
TOLD: dict[str, dict[str, Any]] = {"stun": {"total_sparsity": 0.5}}
CUT = {"tokens": 400, "seq_len": 40, "sample": 100, "ratio": 0.25}


def test_how_many_there_are() -> None:
    assert len(PruneWay.known()) == 11 and len(MergeWay.known()) == 8 and len(WAYS) == 19


def family(way: type[Way]) -> str:
    """A model that a way can reduce: constants need a bias."""
    return "gpt_oss" if way.name == "mone" else "qwen3_moe"


def text_of(tmp_path: Path, way: type[Way]) -> dict[str, Any]:
    return {"calibrate": [str(ids(tmp_path))]} if way.needs.text else {}


@pytest.mark.parametrize(
    ("verb", "told", "spoiled", "said"),
    [
        ("prune", {"method": "router-distance"}, "1.mlp.gate.weight", "rows of a router"),
        (
            "merge",
            {"method": "alike", "features": "router"},
            "1.mlp.gate.weight",
            "rows of a router",
        ),
        ("merge", {"method": "alike"}, "2.mlp.experts.3.down_proj.weight", "weights of layer 2"),
        (
            "merge",
            {"method": "alike", "features": "router", "align": "weights"},
            "2.mlp.experts.3.up_proj.weight",
            "weights of layer 2",
        ),
    ],
)
def test_what_compares_weights_says_which_are_none(
    models: Any, tmp_path: Path, verb: str, told: dict[str, Any], spoiled: str, said: str
) -> None:
    source = shutil.copytree(models("qwen3_moe"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.{spoiled}"].view(-1)[5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(MoetoolError, match=said) as error:
        getattr(api, verb)(str(source), str(tmp_path / "out"), **told)
    assert error.value.hint and "layer" in str(error.value.where["tensor"])
    assert not (tmp_path / "out").exists()


@NAMED
def test_it_describes_itself(verb: str, way: type[Way]) -> None:
    first = way.about().partition(". ")[0]
    assert len(way.about()) > 60 and "\n" not in way.about() and first
    assert way.auto in ("", "text", "no text") and (way.auto != "text" or way.needs.text)
    for option in fields_of(way.Options):
        assert option.help and option.panel in PANELS


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_auto_means_one_way_with_text_and_one_without(verb: str) -> None:
    known = methods.load(verb).ways()
    for meaning in ("text", "no text"):
        assert [way.auto for way in known.values()].count(meaning) == 1
    text = auto_help(known)
    assert all(name in text for name in known)
    method = next(f for f in methods.load(verb).fields() if f.name == "method")
    assert method.help == text and method.choices == ("auto", *known)


@NAMED
def test_its_options_are_its_own(verb: str, way: type[Way], tmp_path: Path) -> None:
    """`make` of what is recorded gives the same again; another way's option is refused by name, but
    its default (as older records hold it) is not.
    """
    made = methods.make(verb, {"method": way.name, "calibrate": "x", **TOLD.get(way.name, {})})
    again = methods.make(verb, json.loads(json.dumps(made.recorded())))
    assert again.recorded() == made.recorded() and again.way.called == way.name
    for field in methods.load(verb).fields():
        if not field.of or way.name in field.of:
            continue
        other = field.choices[-1] if field.choices else 0.375
        options = {"method": way.name, "calibrate": "x", **TOLD.get(way.name, {})}
        with pytest.raises(api.UsageError, match="belong together") as refused:
            methods.make(verb, {**options, field.name: other})
        assert f"--{field.spelled}" in str(refused.value) and field.of[0] in str(refused.value)
        methods.make(verb, {**options, field.name: field.default})


@NAMED
def test_its_needs_are_honest(
    verb: str, way: type[Way], models: Callable[..., Path], tmp_path: Path
) -> None:
    """With exactly the statistics that it asks for it decides; a way that asks for no text decides
    without, and one that asks for some is refused without.
    """
    source = str(models(family(way)))
    options = {"method": way.name, **TOLD.get(way.name, {}), **CUT}
    if way.needs.text:
        with pytest.raises(api.UsageError, match="needs text"):
            getattr(api, verb)(source, str(tmp_path / "none"), **options)
    report = getattr(api, verb)(
        source, str(tmp_path / "out"), **options, **text_of(tmp_path, way), protect=False
    )
    assert report["method_used"] == way.name
    checked = api.verify(str(tmp_path / "out"), against=[source])
    assert checked["verified"] == "bytes"
    assert ("data" in report) == way.needs.text


@NAMED
def test_statistics_that_it_did_not_ask_for_are_not_made(
    verb: str, way: type[Way], models: Callable[..., Path], tmp_path: Path
) -> None:
    """The walk keeps what `needs` says and no more."""
    told = {"method": way.name, **TOLD.get(way.name, {}), **CUT, "protect": False}
    asked = asking(verb, told | text_of(tmp_path, way), models(family(way)), tmp_path)
    if asked.options.walks:  # mergemoe solves: it keeps its samples inside the walk
        assert way.name == "mergemoe"
        return
    seen, needs = look(asked, None), asked.way.needs
    assert (seen.profile is not None) == needs.text
    if seen.profile is not None:
        stats = seen.profile.layer(asked.mixture.layers[0])
        assert stats.has("x") == needs.sample
        assert stats.has("gram") == (needs.sample and needs.dense)
        assert stats.has("in_cov") == needs.covariance


def asking(verb: str, told: dict[str, Any], model: Path, tmp_path: Path) -> Asked:
    """What `moetool VERB` asks, before anything is decided."""
    from moetool.methods.contract import Settings

    made: Any = methods.make(verb, told)
    settings = Settings(work=str(tmp_path / "work"))
    return Asked(verb, made.way, mixture_of(Checkpoint.open(model)), settings)


def test_a_way_that_stands_nowhere_but_in_its_file(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """A file with one class: it is chosen, has options, help and a schema, and prunes."""
    script = tmp_path / "try.py"
    body = '''"""Keep the first."""

from __future__ import annotations

from dataclasses import dataclass

import moetool.methods.prune.way as base
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.reduce.way import Needs


@dataclass(frozen=True)
class Skipped:
    skip: int = option(0, "experts at the front that go first", WHAT, minimum=0)


class First(base.PruneWay):
    """The first experts stay, whatever they do: a way that is here to be tried."""

    name = "first"
    needs = Needs(text=False)
    Options = Skipped

    def score(self, view):
        import numpy as np

        return -((np.arange(view.experts) - self.own.skip) % view.experts).astype(float)
'''
    script.write_text(
        f"""
import moetool
import moetool.methods.prune as package
from moetool.methods.prune.method import Prune

package.__path__.append({str(tmp_path / "more")!r})
source, out = {str(models("qwen3_moe"))!r}, {str(tmp_path / "out")!r}
report = moetool.prune(source, out, method="first", skip=3, ratio=0.5)
print(report["decisions"]["layers"]["1"]["keep"])
print([f.of for f in Prune.fields() if f.name == "skip"], "first" in Prune.ways())
"""
    )
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "first.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[3, 4, 5, 6]", "[('first',)] True"]


def test_registries_import_nothing_heavy() -> None:
    script = """
import sys
from moetool.methods.prune.method import Prune
from moetool.methods.merge.method import Merge
assert Prune.fields() and Merge.fields() and Prune.ways() and Merge.ways()
print([m for m in ("numpy", "torch", "scipy", "transformers") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_parts_are_what_the_options_offer() -> None:
    offered = {f.name: f.choices for f in methods.load("merge").fields()}
    for way in MergeWay.known().values():
        for part in dataclass_fields(way.parts):
            value = getattr(way.parts, part.name)
            said = ("no", "yes")[value] if isinstance(value, bool) else str(value)
            assert said in offered[part.name]
    assert set(COMBINE) < set(offered["combine"])


@pytest.mark.parametrize("said", [True, "true", "True", "yes"])
def test_old_words_of_whiten(said: Any) -> None:
    made: Any = methods.make("merge", {"method": "sub-moe", "calibrate": "x", "whiten": said})
    assert made.way.needs.covariance and made.recorded()["whiten"] == "yes"


@pytest.mark.parametrize("said", [2, "2"])
def test_joint_is_a_number(said: Any) -> None:
    made: Any = methods.make("merge", {"method": "hc-smoe", "calibrate": "x", "joint": said})
    assert made.way.chosen.joint == 2


def test_the_old_word_for_uneven(models: Callable[..., Path], tmp_path: Path) -> None:
    """Taken with a note, recorded under today's word."""
    common = {"method": "frequency", "budget": "sensitivity", "calibrate": [str(ids(tmp_path))]}
    source = str(models("qwen3_moe"))
    old = api.prune(source, str(tmp_path / "old"), layout="zeroed", **common, **CUT)
    new = api.prune(source, str(tmp_path / "new"), uneven="zeroed", **common, **CUT)
    assert old["plan_digest"] == new["plan_digest"] and old["options"]["uneven"] == "zeroed"
    assert any("--uneven" in w for w in old["warnings"]) and "layout" not in old["options"]
    assert not any("--uneven" in w for w in new["warnings"])


@pytest.mark.parametrize("ratio", ["25%", 0.25, "0.25"])
def test_a_ratio_is_a_share(ratio: Any) -> None:
    assert methods.make("prune", {"ratio": ratio}).recorded()["ratio"] == 0.25


# --- what 0.2.0 wrote


def as_of_old(out: Path) -> None:
    """An output's files as 0.2.0 wrote them: orders in the JSON, `layout`, texts joined."""
    record = json.loads((out / "moetool.json").read_text())
    if "table_files" in record:
        (name, seal) = record.pop("table_files").popitem()
        orders = tables.unpack(out / name, seal)
        record["tables"] |= orders
        del record["decisions"]["orders"]
        for key, order in orders.items():
            _, layer, expert = key.split(".")
            own = record["decisions"]["layers"][layer].setdefault("orders", {})
            own[expert] = order
        (out / name).unlink()
        (out / "decisions.json").write_text(json.dumps(record["decisions"]))
    options = record["options"]
    options["layout"] = options.pop("uneven")
    options["max_perplexity_increase"] = ""
    for name in ("calibrate", "text"):
        options[name] = ",".join(options[name])
    options |= {"total_sparsity": 0.0} if record["method"] == "prune" else {"form": "materialised"}
    if record["method"] == "merge":
        options["whiten"] = {"yes": "true", "no": "false"}.get(options["whiten"], "auto")
    (out / "moetool.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("prune", {"method": "reap", "budget": "sensitivity", "uneven": "zeroed"}),
        ("merge", {"method": "m-smoe"}),
        ("merge", {"method": "sub-moe", "whiten": "yes"}),
    ],
    ids=["prune-uneven", "merge-orders", "merge-whitened"],
)
def test_records_of_before_verify_and_replay(
    verb: str, options: dict[str, Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = str(models("qwen3_moe")), tmp_path / "out"
    text = {"calibrate": [str(ids(tmp_path))], **CUT}
    made = getattr(api, verb)(source, str(out), **options, **text)
    as_of_old(out)
    assert api.verify(str(out), against=[source])["verified"] == "bytes"
    file = str(out / "decisions.json")
    again = getattr(api, verb)(source, str(tmp_path / "again"), decisions=file, **options, **text)
    assert again["plan_digest"] == made["plan_digest"]


# --- neuron orders


def test_orders_stand_beside_decisions(models: Callable[..., Path], tmp_path: Path) -> None:
    """As a file that no server takes for weights, sealed; replayed, and edited decisions with it."""
    source = str(models("mixtral"))
    made = api.merge(source, str(tmp_path / "out"), ratio=0.5, method="alike")
    decisions = json.loads((tmp_path / "out" / "decisions.json").read_text())
    file = tmp_path / "out" / decisions["orders"]["file"]
    assert file.suffix != ".safetensors" and made["decisions"] == decisions
    assert all("orders" not in layer for layer in decisions["layers"].values())
    found = tables.unpack(file, decisions["orders"]["sha256"])
    assert len(found) == 4 * 4 and all(sorted(o) == list(range(128)) for o in found.values())
    again = api.merge(
        source, str(tmp_path / "again"), decisions=str(tmp_path / "out" / "decisions.json")
    )
    assert again["plan_digest"] == made["plan_digest"]
    copied = tmp_path / "d.json"
    copied.write_text(json.dumps(decisions))
    with pytest.raises(api.MoetoolError, match="not readable") as refused:
        api.merge(source, str(tmp_path / "none"), decisions=str(copied))
    assert "copy both" in refused.value.hint


def test_every_file_of_a_merge_is_known_as_an_outputs(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """Or a killed run's folder would be a stranger's, and a merged model's files would travel."""
    api.merge(str(models("mixtral")), str(tmp_path / "out"), method="alike")
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert ORDERS in names and all(companions.is_output(name) for name in names)
    assert not companions.travels(ORDERS)


def test_dry_run_leaves_both_files(models: Callable[..., Path], tmp_path: Path) -> None:
    source, file = str(models("mixtral")), tmp_path / "mine.json"
    told = {"decisions": str(file), "tokens": 512}
    planned = api.merge(source, str(tmp_path / "out"), dry_run=True, **told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.tensors"]
    done = api.merge(source, str(tmp_path / "out"), **told)
    assert done["plan_digest"] == planned["plan_digest"]


@pytest.mark.parametrize("harm", ["flip", "gone"])
def test_damaged_orders_are_found(harm: str, models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = str(models("mixtral")), tmp_path / "out"
    api.merge(source, str(out), ratio=0.5, method="alike")
    file = out / "decisions.tensors"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(body)
    with pytest.raises(api.VerificationFailed, match="tables"):
        api.verify(str(out), against=[source])


@pytest.mark.parametrize(
    "said",
    ["decisions.tensors", {"file": "x"}, {"file": "../x", "sha256": "a"}, {"file": 1, "sha256": 2}],
    ids=str,
)
def test_wrong_places_of_orders(said: Any, models: Callable[..., Path], tmp_path: Path) -> None:
    body = {"schema": 1, "experts": 8, "layers": {"0": {"keep": [0]}}, "orders": said}
    (tmp_path / "d.json").write_text(json.dumps(body))
    with pytest.raises(api.UsageError, match="orders") as refused:
        api.merge(str(models("mixtral")), str(tmp_path / "o"), decisions=str(tmp_path / "d.json"))
    assert refused.value.hint


# --- the four steps


@pytest.fixture
def reap(models: Callable[..., Path], tmp_path: Path) -> Asked:
    told = {"method": "reap", "refit": False, "calibrate": [str(ids(tmp_path))], **CUT}
    return asking("prune", told, models("qwen3_moe"), tmp_path)


def test_replayed(reap: Asked, models: Callable[..., Path], tmp_path: Path) -> None:
    assert replayed(reap) is None
    file = tmp_path / "d.json"
    layers = {n: Decision.keep(range(6)) for n in reap.mixture.layers}
    for name, data in Decided("prune", "reap", 8, layers).files("d.json").items():
        (tmp_path / name).write_bytes(data)
    told = {"method": "reap", "decisions": str(file)}
    asked = asking("prune", told, models("qwen3_moe"), tmp_path)
    found = replayed(asked)
    assert found is not None and dict(found.layers) == layers


def test_statistics_then_choose(reap: Asked) -> None:
    """A step is a function of what the one before gave: the same statistics, the same choice."""
    seen = look(reap, None)
    assert seen.profile is not None and seen.data is not None and seen.data.tokens == 400
    first, second = choose(reap, seen, None), choose(reap, seen, None)
    assert first.layers == second.layers and first.found == second.found
    for number, decision in first.layers.items():
        score = seen.profile.layer(number).mean("reap")
        within = bounds(reap, seen, None).of(number)
        rest = [e for e in np.argsort(-score, kind="stable") if e not in within]
        best = sorted([*within, *rest][:6])
        assert decision.leads == best and decision.count == 6
        assert sum(first.found.tokens_per_expert[number]) == 400 * reap.mixture.top_k
    assert solve(reap, seen, first) == first  # nothing asked for


def test_solve_writes_what_it_solved(models: Callable[..., Path], tmp_path: Path) -> None:
    source = str(models("qwen3_moe"))
    stats = str(tmp_path / "stats")
    api.profile(source, stats, calibrate=[str(ids(tmp_path))], tokens=400, seq_len=40, sample=400)
    told = {"method": "reap", "stats": stats, "refit": True, "ratio": 0.25}
    asked = asking("prune", told, models("qwen3_moe"), tmp_path)
    seen = look(asked, None)
    made = solve(asked, seen, choose(asked, seen, None))
    assert made.found.refit.keys() == set(asked.mixture.layers)
    assert all(r.after < r.before for r in made.found.refit.values())
    (extra,) = made.extra
    assert len(extra.tensors) == 6 * len(asked.mixture.layers)
    name = beside.solved_name(asked.mixture.layers[0], 0, "down")
    assert extra.matrix(name).dtype == torch.float32


def test_facts_are_returned_and_no_state_is_left(reap: Asked, tmp_path: Path) -> None:
    """Deciding twice gives the same values: nothing was poked into the question."""
    from moetool.methods.reduce.decide import decide

    before = dict(vars(reap))
    one, two = decide(reap), decide(reap)
    assert one.found == two.found and one.chosen == two.chosen and one.memory == two.memory
    assert {k: v for k, v in vars(reap).items() if k in before} == before


@pytest.mark.parametrize("told", [{"whiten": "yes"}, {"weigh": "frequency"}, {"joint": "2"}])
def test_a_way_without_text_whose_options_need_some(
    told: dict[str, str], models: Any, tmp_path: Path
) -> None:
    """The hint does not name the very way that was asked for."""
    with pytest.raises(api.UsageError, match="needs text") as error:
        api.merge(str(models("mixtral")), str(tmp_path / "out"), method="alike", **told)
    assert "alike" not in (error.value.hint or "") and "options" in (error.value.hint or "")


def test_outliers_are_over_the_mean_of_the_whole_layer() -> None:
    """OWL (arXiv 2310.05175): all matrices of a layer are one heap of scores."""
    dice = np.random.default_rng(0)
    wide, narrow = dice.standard_cauchy((3, 8, 6)), 9 * dice.normal(size=(3, 6, 4))
    energy = [dice.uniform(1, 50, (3, 6)), dice.uniform(1, 2, (3, 4))]
    held = SimpleNamespace(gate_up=torch.from_numpy(wide), down=torch.from_numpy(narrow))
    seen = SimpleNamespace(in_sq=energy[0], mid_sq=energy[1])
    view: Any = SimpleNamespace(experts=3, block=SimpleNamespace(experts=held), seen=seen)
    pairs = zip((wide, narrow), energy, strict=True)
    heap = np.concatenate([(np.abs(w) * np.sqrt(e)[:, None]).ravel() for w, e in pairs])
    expected = (heap > stun.OUTLIER * heap.mean()).mean()
    assert 0 < expected < 0.2 and stun.outliers(view) == pytest.approx(expected, abs=1e-9)
