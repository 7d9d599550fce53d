"""The name of data that is not ours to type: configs, records and parameters are JSON objects; the
values are whatever their writers put there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
JsonMapping = Mapping[str, Any]
