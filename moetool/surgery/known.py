"""What the tensors of some files are to their family: told by the forms, by a GGUF's table, or by
the data of a family whose class lies on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping

from moetool.data import JsonObject
from moetool.surgery import forms, hub
from moetool.surgery.forms import Known
from moetool.surgery.forms.form import Read
from moetool.surgery.gguf import reading
from moetool.surgery.spec import Stored


def known(
    lying: Mapping[str, Stored],
    config: JsonObject,
    types: Mapping[str, str] | None,
    read: Read | None = None,
) -> Known:
    """Tensors by the family's names, whatever they are made of. `types`: of a GGUF file, the kinds
    of its blocks by tensor; None for safetensors. `read`: see `forms.seen`.
    """
    if types is None:
        return hub.seen(forms.seen(lying, config, read))
    return reading.seen(lying, types, config)
