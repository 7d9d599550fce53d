"""Every kind of output in every client: what it computes must be what the data of clients says, so
that a cell that says wrong is wrong. By default the installed transformers is asked for some of
them; `pytest -m clients` asks all clients for all (tests/clients/__init__.py).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from clients import asking
from clients.outputs import OUTPUTS, TRAINED, trained
from moetool.surgery import pair as pair_data

HERE = "transformers5"
# One of each kind: other tests have every pair in the installed transformers.
SOME = (
    "llama-mixtral-fine",
    "llama-mixtral-fused",
    "mistral-mixtral-window",
    "llama-qwen2_moe-tied",
    "qwen2_moe-pruned",
    "gpt_oss-merged",
)


# What an environment without torchvision, and a build that lacks some kernels, leave out.
UNTESTED = {"vllm": ("llava", "qwen3_vl", "qwen3_5_text", "deepseek_v", "minimax_m2")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def test_what_there_is() -> None:
    """Every pair, every verb that makes models, and every family by itself."""
    pairs = {f"{pair.source}-{pair.target}" for pair in pair_data.pairs()}
    assert pairs <= OUTPUTS.keys() and set(SOME) <= OUTPUTS.keys()
    verbs = Counter(output.verb for output in OUTPUTS.values())
    assert verbs == {
        **{"upcycle": 56, "prune": 28, "merge": 14, "convert_layout": 4},
        **{"dequantize": 29, "materialize": 6, "": 25},
    }


@pytest.mark.parametrize("name", SOME)
def test_the_installed_transformers(root: Path, name: str) -> None:
    """Nothing missing, nothing left over, what the data says, and routing counts."""
    folder = OUTPUTS[name].write(root)
    reference = asking.Reference.of(folder)
    assert asking.said(HERE, folder) == "works"
    assert abs(reference.logits - without_routers(folder)).max() > 1e-2


def without_routers(folder: Path) -> object:
    """Logits of an output whose routers are zero."""
    import torch

    model = tiny.load(folder)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "router.weight")):
                value.zero_()
        return model(input_ids=torch.tensor(asking.ROWS)).logits.numpy()


@pytest.mark.clients
@pytest.mark.parametrize("client", asking.SCRIPTS)
def test_every_output(root: Path, client: str) -> None:
    if asking.home(client) is None:
        pytest.skip(f"untested: MOETOOL_CLIENTS has no {client} ({len(OUTPUTS)} outputs)")
    measured = asking.measured([client], OUTPUTS.values(), root)[client]
    assert measured.keys() == OUTPUTS.keys()
    compared = {n: m for n, m in measured.items() if m.state != "untested"}
    lacking = measured.keys() - compared.keys()
    assert all(name.startswith(UNTESTED.get(client, ())) for name in lacking), lacking
    says = {name: asking.said(client, output.write(root)) for name, output in OUTPUTS.items()}
    apart = [f"{n}: {says[n]}, measured: {m}" for n, m in compared.items() if says[n] != m.state]
    assert not apart, "\n".join(apart)
    rough = {o.family for n, o in OUTPUTS.items() if asking.NEAR < measured[n].gap < asking.ROUGH}
    assert client == "vllm" or set(asking.ROUGHLY.get(client, ())) <= rough


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes


@pytest.mark.clients
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model(scratch: Path, name: str) -> None:
    if not (trained() / "config.json").exists():
        pytest.skip(f"{trained()} is not there")
    output = TRAINED[name]
    for client, found in asking.measured(asking.SCRIPTS, [output], scratch).items():
        assert found[name].state == asking.said(client, scratch / name), (client, str(found[name]))
    assert asking.from_dense(output, scratch) < asking.NEAR
