"""The data of clients (archs/clients.json), read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moetool.data import JsonObject
from moetool.errors import MoetoolError, did_you_mean
from moetool.surgery.clients.families import Models
from moetool.surgery.clients.formats import Case, Demand
from moetool.surgery.layout import DATA

FILE = DATA / "clients.json"


@dataclass(frozen=True)
class Client:
    """A client: what it reads of single matrices, rules for all of them, and what it makes of whole
    models.
    """

    about: str
    version: str
    forms: Mapping[str, tuple[Case, ...]]
    models: Models
    rules: tuple[Demand, ...] = ()

    @classmethod
    def read(cls, data: JsonObject) -> Client:
        """TypeError for an unknown key, in nested parts too."""
        rest = dict(data)
        forms = {n: tuple(map(Case.read, cases)) for n, cases in rest.pop("forms").items()}
        rules = tuple(map(Demand.read, rest.pop("rules", ())))
        return cls(forms=forms, rules=rules, models=Models.read(rest.pop("models")), **rest)


@lru_cache(maxsize=1)
def clients() -> dict[str, Client]:
    """Every client by its name. MoetoolError for a file that is not as it should be."""
    return read(FILE)


def read(path: Path) -> dict[str, Client]:
    """The clients of a file. MoetoolError for an unknown key, or a cell without a reason."""
    try:
        return {name: Client.read(entry) for name, entry in json.loads(path.read_text()).items()}
    except (TypeError, KeyError, AttributeError, ValueError) as problem:
        raise MoetoolError(
            f"the data of clients is not as it should be: {problem}",
            file=path,
            hint="correct it; moetool/surgery/clients/ says what it may hold",
        ) from None


def client(name: str) -> Client:
    """A client by name; MoetoolError with the nearest names."""
    if name not in clients():
        raise MoetoolError(
            f"no client {name!r}",
            expected=", ".join(clients()),
            hint=did_you_mean(name, clients()),
        )
    return clients()[name]
