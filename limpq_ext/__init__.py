"""Mixed-precision quantization by learned layer-wise importance (LIMPQ, arXiv 2203.08368).

The pipeline, in the order of the names: ``prepare`` a float model with several bit-widths per
layer, train its importance indicators with ``JointTrainer``, count costs with ``profile``, find the
bits of every layer with ``search``, put them in place with ``apply_policy``, and ``finetune``.

Names are loaded when they are asked for, so that ``limpq --help`` needs no torch.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

# The list that type checkers read is the only one.
_HOMES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("limpq_ext")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] is None:  # a room
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
