"""The file beside the weights of a model with groups of experts that says to transformers where its
code is: `modeling_moetool.py`, named by `auto_map` in config.json. It holds no model, so that
without moetool there is an error and never random weights.
"""

from __future__ import annotations

from moetool.data import JsonMapping

FILE = "modeling_moetool.py"
AUTO_MAP = {"AutoConfig": "modeling_moetool.MoetoolConfig"}
TEXT = '''"""This model holds experts that no class of transformers has; moetool runs them.

    pip install moetool
    import moetool
    model = moetool.load(".")
"""

try:
    from moetool.modeling.carrier import MoetoolConfig
except ImportError as problem:
    raise ImportError(
        f"this model holds experts that moetool runs: pip install moetool ({problem})"
    ) from None

__all__ = ["MoetoolConfig"]
'''


def beside(config: JsonMapping) -> dict[str, bytes]:
    """The file, for a config that names it."""
    return {FILE: TEXT.encode()} if config.get("auto_map") == AUTO_MAP else {}
