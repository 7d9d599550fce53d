"""Experts as they run: one file a form, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache

from moetool import discover
from moetool.errors import MoetoolError
from moetool.modeling.experts.group import ExpertGroup
from moetool.surgery import strict
from moetool.surgery.groups import Group


@lru_cache(maxsize=1)
def forms() -> Mapping[str, type[ExpertGroup]]:
    """form -> the experts of a group in this form."""
    return discover.classes(sys.modules[__name__], ExpertGroup)


def sites_of(form: str) -> tuple[str, ...]:
    """Where alone experts of a form can be; nothing where that is anywhere, or the form unknown."""
    return forms()[form].sites if form in forms() else ()


def named(group: Group) -> type[ExpertGroup]:
    """Those of a group's form; MoetoolError where there is none, or none over its base."""
    strict.word(group.form, tuple(forms()), "experts have the form")
    found = forms()[group.form]
    if group.base not in found.bases:
        raise MoetoolError(
            f"{group.form} experts do not stand {group.base!r} an FFN",
            file="config.json",
            expected=", ".join(found.bases),
            found=group.base,
            hint="the config was written by another moetool, or edited",
        )
    return found
