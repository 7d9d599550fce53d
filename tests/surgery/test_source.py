"""A source is a path, the embedded model, or a Hub id; what the Hub says reaches the user whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from moetool.demo import MODEL as DEMO
from moetool.errors import MoetoolError
from moetool.surgery.source import DATASET, MODEL, HubId, Snapshot, locate


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/7", ("org/name", "refs/pr/7")),
        ("Some-Org.x/model_7-B@v1.0", ("Some-Org.x/model_7-B", "v1.0")),
        ("name", None),
        ("a/b/c", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("org/name@", None),
        ("org/na me", None),
        ("", None),
    ],
)
def test_hub_ids(name: str, read: tuple[str, str | None] | None) -> None:
    found = HubId.read(name)
    assert (found and (found.repo, found.revision)) == read


@pytest.mark.parametrize("name", ["folder", "./absent/model", "model.safetensors", "a/b/c"])
def test_what_is_no_hub_id_is_a_path(name: str) -> None:
    assert locate(name) == Path(name)


def test_a_folder_that_is_there_wins_over_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    assert locate("org/name") == Path("org/name")
    assert locate("demo") == DEMO
    (tmp_path / "demo").mkdir()
    assert locate("demo") == Path("demo")


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model") == tmp_path / "model"


@pytest.mark.parametrize("wanted", [MODEL, DATASET], ids=["model", "dataset"])
def test_what_is_asked_of_the_hub(
    wanted: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **more: Any) -> str:
        asked.update(more, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert HubId("org/name", "v2").download(wanted) == tmp_path
    assert (asked["repo"], asked["revision"]) == ("org/name", "v2")
    assert asked["repo_type"] == wanted.kind and asked["allow_patterns"] == list(wanted.patterns)
    assert not any("bin" in p or "py" in p for p in wanted.patterns)  # no pickles, no code


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (LocalEntryNotFoundError("not in the cache\nmore"), "not in the cache"),
        (OSError("no network"), "no network"),
        (OSError(), "OSError"),
    ],
)
@pytest.mark.parametrize("wanted", [MODEL, DATASET], ids=["model", "dataset"])
def test_the_hubs_reason_is_said(
    wanted: Snapshot, problem: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(MoetoolError) as caught:
        HubId("org/name").download(wanted)
    sentence = str(caught.value)
    assert f"org/name is no local {wanted.local}, and the Hub does not give it: {said}" in sentence
    assert "more" not in sentence and wanted.expected in sentence
    assert wanted.gated in caught.value.hint
