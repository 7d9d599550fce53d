"""Sites of groups of experts: found by themselves, read strictly, each known to planners and models."""

from __future__ import annotations

import pytest

from moetool.errors import MoetoolError
from moetool.surgery import groups, places
from moetool.surgery.groups import Group
from moetool.surgery.text_model import text_model

BASE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}


def test_every_site_runs_and_every_one_that_runs_is_planned() -> None:
    from moetool.modeling import sites

    assert [*sites.sites()] == [*places.known()]
    assert all(place.about() for place in places.known().values())


def test_an_unknown_site_is_named() -> None:
    config = groups.config_of(dict(BASE), (Group("null", 1, (0,), site="fnn"),))
    with pytest.raises(MoetoolError, match="'fnn'") as raised:
        text_model(config)
    assert "ffn" in str(raised.value.hint)
