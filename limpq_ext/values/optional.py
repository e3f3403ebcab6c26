"""Imports of what only some installations have."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import a module that comes with one of the package's extras.

    Args:
        module: Name of the module, as in ``import module``.
        extra: The extra that installs it, as in ``pip install 'limpq_ext[extra]'``.

    Returns:
        The module.

    Raises:
        ImportError: If it cannot be imported; the message is the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"limpq_ext.{extra} needs {module}: pip install 'limpq_ext[{extra}]'"
        ) from error
