"""`--overwrite` replaces an output, and nothing of a user's; a link stays a link; only known
companions travel, and no link leads out of the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import tree

from moetool import MoetoolError, UsageError, upcycle
from moetool.surgery import companions
from moetool.surgery.checkpoint import Checkpoint


def put(path: Path, text: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# What stands where the output shall be; "ours" is an output of moetool, "git" a repository.
PRECIOUS: dict[str, list[str]] = {
    "a thesis": ["thesis.tex"],
    "a thesis deep down": ["a/b/thesis.tex"],
    "a git repository": ["git", "model.safetensors"],
    "a README": ["README.md"],
    "a README and a licence": ["README.md", "LICENSE"],
    "only a moetool.json": ["moetool.json"],
    "a moetool.json and a thesis": ["moetool.json", "config.json", "thesis.tex"],
    "a hidden file": ["model.safetensors", ".netrc"],
    "pickles": ["pytorch_model.bin"],
    "code": ["model.safetensors", "train.py"],
    "an empty folder in it": ["runs/"],
    "a folder named like a shard": ["a.safetensors/"],
    "an output and a note": ["ours", "notes.txt"],
    "an output and a run": ["ours", "runs/1/events"],
    "an output and statistics": ["ours", "stats/profile.json"],
}


def make(out: Path, names: list[str]) -> None:
    for name in names:
        if name == "ours":
            upcycle(str(out.parent / "SRC"), str(out))
        elif name == "git":
            subprocess.run(["git", "init", "-q", str(out)], check=True)
        elif name.endswith("/"):
            (out / name).mkdir(parents=True)
        else:
            put(out / name)


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "SRC"))


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("what", PRECIOUS)
def test_nothing_of_a_users_is_deleted(
    what: str, overwrite: bool, source: Path, tmp_path: Path
) -> None:
    make(tmp_path / "out", PRECIOUS[what])
    before = tree(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as caught:
        upcycle(str(source), str(tmp_path / "out"), overwrite=overwrite)
    assert caught.value.hint
    assert (tree(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_a_folder_that_is_a_link_is_filled_and_the_link_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "real")
    upcycle(str(source), str(out))
    first = tree(out)
    assert out.is_symlink() and (tmp_path / "disk" / "real" / "config.json").is_file()
    upcycle(str(source), str(out), overwrite=True, experts=4)
    assert out.is_symlink() and tree(out) != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SRC", "disk", "out"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]
    put(tmp_path / "disk" / "real" / "thesis.tex")
    with pytest.raises(UsageError, match="not deleted"):
        upcycle(str(source), str(out), overwrite=True)


def test_a_link_that_leads_nowhere(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="leads nowhere"):
        upcycle(str(source), str(tmp_path / "out"), overwrite=True)
    assert os.readlink(tmp_path / "out") == str(tmp_path / "absent")


def test_links_in_a_replaced_output_are_removed_and_not_followed(
    source: Path, tmp_path: Path
) -> None:
    put(tmp_path / "elsewhere" / "weights")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "weights")
    upcycle(str(source), str(tmp_path / "out"), overwrite=True)
    assert (tmp_path / "elsewhere" / "weights").read_text() == "mine"
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def test_a_mount_point_is_said_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(UsageError, match="mount point"):
        upcycle(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize("name", [".out.moetool", ".out.moetool-old", ".out.moetool-work"])
def test_a_users_folder_where_moetool_works(name: str, source: Path, tmp_path: Path) -> None:
    upcycle(str(source), str(tmp_path / "out"))
    put(tmp_path / name / "thesis.tex")
    before = tree(tmp_path / name) | tree(tmp_path / "out")
    with pytest.raises(MoetoolError, match=r"thesis\.tex"):
        upcycle(str(source), str(tmp_path / "out"), overwrite=True)
    assert tree(tmp_path / name).items() <= before.items()
    assert tree(tmp_path / "out").items() <= before.items()


def test_the_old_one_is_back_when_the_new_one_cannot_stand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upcycle(str(source), str(tmp_path / "out"))
    before, real = tree(tmp_path / "out"), os.replace

    def failing(a: Path | str, b: Path | str) -> None:
        if Path(a).name == ".out.moetool":
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        upcycle(str(source), str(tmp_path / "out"), overwrite=True, experts=4)
    assert tree(tmp_path / "out") == before


COMPANIONS = ["tokenizer.json", "LICENSE", "chat_template.jinja", "generation_config.json"]


@pytest.mark.parametrize("name", [*COMPANIONS, "config.json", "tokenizer.model"])
@pytest.mark.parametrize("to", ["/etc/passwd", "/proc/self/environ", "file", "folder"])
def test_links_out_of_the_folder_are_refused(
    name: str, to: str, source: Path, tmp_path: Path
) -> None:
    put(tmp_path / "outside" / name)
    target = {"file": tmp_path / "outside" / name, "folder": tmp_path / "outside"}.get(to, Path(to))
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(target)
    if to == "folder" and name != "config.json":
        assert name not in Checkpoint.open(source).travelling()
        return
    with pytest.raises(MoetoolError, match="leads out of the folder"):
        upcycle(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_links_of_a_hub_cache_travel(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    put(source / "tokenizer.json", "{}")
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, snapshot.parent.parent / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    upcycle(str(snapshot), str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


STAY = {
    "modeling_llama.py": "code",
    "adapter_config.json": "{}",
    "training_args.json": "{}",
    "secrets.json": "{}",
    "notes.txt": "mine",
    "requirements.txt": "torch",
    "quantize_config.json": "{}",
    "pytorch_model.bin": "",
    "THESIS.md": "mine",
}
TRAVEL = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "qwen.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
]


def test_only_known_companions_travel_and_the_rest_is_named(source: Path, tmp_path: Path) -> None:
    for name in TRAVEL:
        put(source / name, "{}")
    for name, text in STAY.items():
        put(source / name, text)
    put(source / "README.md")
    put(source / "original" / "params.json")
    report = upcycle(str(source), str(tmp_path / "out"))
    there = set(os.listdir(tmp_path / "out"))
    assert set(TRAVEL) <= there and not set(STAY) & there and "original" not in there
    (line,) = [w for w in report["warnings"] if w.startswith("left behind")]
    assert "THESIS.md" in line and "and 4 more" in line and "README" not in line
    assert companions.left_behind(source).count(",") == 6
