"""What a network is, as digests: what its forward computes, its modules, and its source.

Stages that are kept on disk are reused only for the network that they were made with.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from limpq_ext.values.reading import first_line

_VIEWS = frozenset(
    ("alias", "clone", "contiguous", "detach", "reshape", "_reshape_alias", "view", "_unsafe_view")
)
"""Operators that change no value; a rewrite of the same network may have others of them."""


def graph_digest(model: nn.Module, example_input: Tensor) -> str:
    """A digest of what a forward in evaluation mode computes, weights by their names and shapes.

    Two networks that run the same operators with the same arguments on the same tensors have the
    same digest, whatever their source and their modules are called.

    Args:
        model: It is not changed, and nothing is computed.
        example_input: What its forward takes, with a batch axis; only its shape matters.

    Raises:
        ValueError: The forward cannot be followed.
    """
    model = copy.deepcopy(model).eval()
    names = {id(value): name for name, value in model.named_parameters()}
    names |= {id(value): name for name, value in model.named_buffers()}
    sample = example_input[:1].detach().clone()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(names)
    try:
        # With gradients: without them attention takes another path.
        with torch.enable_grad(), fake_mode, recorder:
            model(fake_mode.from_tensor(sample))
    except Exception as error:
        raise ValueError(
            f"cannot follow {type(model).__name__}.forward: {first_line(error, typed=True)}"
        ) from error
    return _digest(recorder.calls)


def structure_digest(model: nn.Module) -> str:
    """A digest of a model's modules: names, classes, plain attributes, shapes of tensors.

    It tells apart what evaluation does not show, such as the share that a dropout drops.

    Args:
        model: Any module.
    """
    modules = [
        [
            name,
            f"{type(module).__module__}.{type(module).__qualname__}",
            {
                key: _plain(value)
                for key, value in sorted(vars(module).items())
                if not key.startswith("_") and key != "training"
            },
            {
                key: [list(value.shape), str(value.dtype), value.requires_grad]
                for key, value in (
                    *module.named_parameters(recurse=False),
                    *module.named_buffers(recurse=False),
                )
            },
        ]
        for name, module in model.named_modules()
    ]
    return _digest(modules)


def source_digest(model: nn.Module, factory: str | None = None) -> str:
    """A digest of the Python source that a model is made of, without comments and layout.

    It covers the modules of Python that define the model's classes and its factory, and what those
    take from others; not the standard library and installed packages.

    Args:
        model: Any module.
        factory: Name of the module of Python that has the function that made it.
    """
    waiting = [type(module).__module__ for module in model.modules()]
    waiting += [] if factory is None else [factory]
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or module is None:
            continue
        seen.add(name)
        file = _own_source(module)
        if file is None:
            continue
        found[name] = ast.dump(ast.parse(file.read_bytes()))
        for value in list(vars(module).values()):
            other = value.__name__ if isinstance(value, ModuleType) else _module_of(value)
            if other is not None:
                waiting.append(other)
    return _digest(found)


class _Recorder(TorchDispatchMode):
    """Writes down every operator with its arguments; tensors by where they come from."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._names = dict(names)
        self._count = 0
        self._kept: list[Tensor] = []  # so that no other tensor gets the same id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = tree_map(self._described, [list(args), dict(kwargs or {})])
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _VIEWS:
            # The output goes by the name of what it shows; its shape is in what reads it.
            source = next(value for value in args if isinstance(value, Tensor))
            self._name(output, self._names.get(id(source)) or self._new(source))
            return output
        if func.namespace != "prim":  # questions, as for the device
            self.calls.append([name.removesuffix("_"), arguments])
            tree_map(self._new, output)
        return output

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self._names.get(id(value)) or self._new(value)
            return [name, list(value.shape), str(value.dtype)]
        return value if isinstance(value, bool | int | float | str | None) else str(value)

    def _new(self, value: Any) -> str:
        name = f"%{self._count}"
        if isinstance(value, Tensor):
            self._count += 1
            self._name(value, name)
        return name

    def _name(self, value: Tensor, name: str) -> None:
        self._names[id(value)] = name
        self._kept.append(value)


def _plain(value: Any) -> Any:
    """A value in a form that JSON has; of what is not plain, its kind or name."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), str(value.dtype)]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return f"{_module_of(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _module_of(value: Any) -> str | None:
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else None


def _own_source(module: ModuleType) -> Path | None:
    """The source of a module that is neither of an installed package nor of this one."""
    name = getattr(module, "__file__", None)
    if name is None or not name.endswith(".py") or module.__name__.split(".")[0] == "limpq_ext":
        return None
    file = Path(name).resolve()
    return None if any(file.is_relative_to(folder) for folder in _installed()) else file


def _installed() -> Iterable[Path]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return {Path(folder).resolve() for folder in (*folders, site.getusersitepackages())}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
