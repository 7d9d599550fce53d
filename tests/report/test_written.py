"""What stands beside the weights says the truth about them, and the same for the same command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import moetool
from moetool.surgery import identity
from moetool.surgery.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts, and two prunings of it, in one folder."""
    root = tmp_path_factory.mktemp("made")
    moetool.upcycle("demo", str(root / "moe"), experts=4, diversify="permute", seed=3)
    moetool.prune(str(root / "moe"), str(root / "half"), ratio=0.5, method="random", seed=1)
    moetool.merge(str(root / "moe"), str(root / "merged"), ratio=0.5, method="alike")
    return root


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The Hub's metadata, and the text below."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize(
    ("name", "verb"), [("moe", "upcycle"), ("half", "prune"), ("merged", "merge")]
)
def test_a_card_has_metadata_command_and_certificate(name: str, verb: str, made: Path) -> None:
    head, text = card(made / name)
    assert "base_model_relation" not in head, "one model, whatever was solved for it"
    assert head["library_name"] == "transformers" and head["tags"] == ["moe", "moetool", verb]
    assert text.lstrip().startswith(f"# {name}\n") and f"```\nmoetool {verb}" in text
    record = load(made / name / "moetool.json")["report"]
    assert f"| certificate | {record['certificate']['level']}" in text
    assert record["certificate"]["why"] in text
    assert str(made) not in text, "a card tells no path of this machine"


def test_a_card_lists_what_was_left_out(made: Path) -> None:
    _, text = card(made / "moe")
    report = load(made / "moe" / "moetool.json")["report"]
    assert report["dropped_fields"]
    for field, why in report["dropped_fields"].items():
        assert f"- left out: `config.{field}` ({why})" in text


def test_a_card_of_fewer_experts_says_how_many(made: Path) -> None:
    _, text = card(made / "half")
    assert "4 -> 2 experts a layer (50 % removed) by random" in text
    assert "warning: no text" in text


def test_the_command_is_the_one_that_was_typed(tmp_path: Path, moetool: Callable[..., Any]) -> None:
    done = moetool("upcycle", "demo", tmp_path / "my moe", "--experts", "4", "--quiet")
    assert done.returncode == 0
    command = load(tmp_path / "my moe" / "moetool.json")["command"]
    assert command.startswith("moetool upcycle demo") and "--experts 4" in command
    assert f"'{tmp_path}/my moe'" in command, "as a shell would take it"
    assert command in card(tmp_path / "my moe")[1]


def test_a_card_of_a_dense_model_speaks_of_no_experts(tmp_path: Path) -> None:
    moetool.quantize("demo", str(tmp_path / "out"), format="gguf:q8_0")
    head, text = card(tmp_path / "out")
    assert head["tags"] == ["moetool", "quantize"] and "A model made by" in text
    assert "expert" not in text.partition("|---|")[2].partition("`moetool verify")[0]


def test_several_sources_are_a_merge_of_models(tmp_path: Path) -> None:
    moetool.upcycle(
        "demo", str(tmp_path / "out"), experts=2, experts_from=["demo"], expert_map="0,1"
    )
    head, text = card(tmp_path / "out")
    assert head["base_model_relation"] == "merge" and text.count("- `demo`") == 2


@pytest.mark.parametrize("name", ["moe", "half", "merged"])
def test_a_record_is_enough_to_check_the_output(name: str, made: Path) -> None:
    record = load(made / name / "moetool.json")
    assert record["schema"] == 1 and record["moetool"] == moetool_version()
    config = (made / name / "config.json").read_bytes()
    assert record["config_sha256"] == hashlib.sha256(config).hexdigest()
    source = Checkpoint.open(made / "moe") if name != "moe" else None
    if source is not None:
        assert record["sources"] == [
            {
                "name": str(made / "moe"),
                "files": [list(f) for f in source.fingerprint()],
                "content": identity.content(source),
            }
        ]
    weights = Checkpoint.open(made / name)
    assert record["report"]["tensors"] == len(weights.tensors)
    assert record["report"]["output_bytes"] == sum(size for size, _ in weights.files.values())
    for run_only in ("seconds", "jobs", "free_disk", "peak_memory", "out", "peak_rss"):
        assert run_only not in record["report"], "facts of one run would make equal outputs differ"


def moetool_version() -> str:
    from importlib.metadata import version

    return version("moetool")


def test_options_are_recorded_as_they_were(made: Path) -> None:
    record = load(made / "moe" / "moetool.json")
    assert record["seed"] == 3 and record["options"]["diversify"] == "permute"
    assert record["options"]["experts"] == 4 and record["options"]["top_k"] == 2
    again = load(made / "half" / "report.json")
    assert again["seed"] == 1 and again["options"]["method"] == "random"


@pytest.mark.parametrize(("name", "verb"), [("half", "prune"), ("merged", "merge")])
def test_a_report_maps_every_old_expert(name: str, verb: str, made: Path) -> None:
    report = load(made / name / "report.json")
    assert report["schema"] == 1 and report["verb"] == verb
    assert (report["experts_before"], report["experts_after"]) == (4, 2)
    assert report["removed_share"] == 0.5
    assert report["expert_bytes_before"] == 2 * report["expert_bytes_after"]
    assert sorted(report["layers"]) == ["0", "1", "2", "3"]
    for layer in report["layers"].values():
        new = [e for e in layer["map"] if e is not None]
        assert len(layer["map"]) == 4 and set(new) == {0, 1}
        assert len(new) == (2 if verb == "prune" else 4), "merged experts all live on"


def test_kept_experts_are_where_the_map_says(made: Path) -> None:
    old, new = Checkpoint.open(made / "moe"), Checkpoint.open(made / "half")
    report = load(made / "half" / "report.json")
    from moetool.surgery.spec import whole

    for number, layer in report["layers"].items():
        for before, after in enumerate(layer["map"]):
            if after is None:
                continue
            name = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
            a = old.tensors[name.format(number, before)]
            b = new.tensors[name.format(number, after)]
            assert bytes(old.read(whole(a))) == bytes(new.read(whole(b)))


def test_lists_for_servers_agree_with_the_report(made: Path) -> None:
    report = load(made / "half" / "report.json")
    listed = load(made / "half" / "experts.json")["layers"]
    lines = [json.loads(r) for r in (made / "half" / "experts.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(report["layers"]) and len(lines) >= len(listed)


def test_the_same_command_writes_the_same_record(made: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        out = tmp_path / str(number) / "moe"
        moetool.upcycle("demo", str(out), experts=4, diversify="permute", seed=3)
        for name in ("moetool.json", "README.md", "config.json"):
            assert (out / name).read_bytes() == (made / "moe" / name).read_bytes()


def test_a_long_record_stays_readable(made: Path) -> None:
    """Decisions a layer a line, neuron orders on one."""
    lines = (made / "half" / "moetool.json").read_text().splitlines()
    assert sum('"keep"' in line for line in lines) == 4
    assert lines[-2].startswith(' "tables": {') and lines[-1] == "}"
