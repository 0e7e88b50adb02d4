"""Pickled models as data: every class a file names becomes an inert stand-in, so that nothing of it runs.

LLM-Pruner and Torch-Pruning save the model object itself, because no class builds a model whose layers
differ. A module's pickle is its ``__dict__``: parameters, buffers and submodules by name. That is all that is
needed, and it can be had without importing, calling or executing anything that the file names: tensors are
rebuilt from their storages, containers are Python's own, and any other class or function is an empty class
that keeps the state it is given. Meant to run inside the sandboxed process all the same.
"""

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

MAX_MODULES = 1_000_000
# Torch-Pruning's own file: every module's __dict__ under the module's name, the model's under "".
_FLAT_KEY = "full_state_dict"


class Inert:
    """What stands for an object of any class: made from anything, it does nothing and keeps its state."""

    path = ""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Make one, whatever the arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Keep a ``__dict__``; other kinds of state are nothing we need."""
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Drop an item of a stand-in for a dict."""

    def append(self, _item: Any) -> None:
        """Drop an item of a stand-in for a list."""

    def extend(self, _items: Any) -> None:
        """Drop the items of a stand-in for a list."""

    def add(self, _item: Any) -> None:
        """Drop an item of a stand-in for a set."""

    @property
    def kept(self) -> dict[str, Any]:
        """The state; empty where pickle set none (it may skip ``__init__``)."""
        return self.__dict__.get("state", {})


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)  # type: ignore[attr-defined]


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _reconstructed(cls: Any, *_: Any) -> Any:
    return cls()


_SAFE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
} | {
    # Files written for Python 2's names, which is what torch.save does.
    (module, name): value
    for modules, values in (
        (("builtins", "__builtin__"), {"set": set, "dict": dict, "list": list, "tuple": tuple}),
        (("copyreg", "copy_reg"), {"_reconstructor": _reconstructed}),
    )
    for module in modules
    for name, value in values.items()
}


@cache
def _stand_in(module: str, name: str) -> type[Inert]:
    return type("StandIn", (Inert,), {"path": f"{module}.{name}"})


class _Unpickler(pickle.Unpickler):
    """Resolves names from the closed table above alone; torch adds the storages."""

    def find_class(self, module: str, name: str) -> Any:
        """The real thing for what tensors and containers need, a stand-in for anything else."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _SAFE.get((module, name)) or _stand_in(module, name)


class _InertPickle:
    """What ``torch.load`` needs of a pickle module."""

    __name__ = __name__
    Unpickler = _Unpickler


def load_inert(path: Path) -> Any:
    """Open a file written by ``torch.save`` with stand-ins for all classes but tensors and containers.

    Raises:
        pickle.UnpicklingError, RuntimeError, TypeError, ...: it is damaged.
    """
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=_InertPickle())


def find_model(loaded: Any, keys: Iterable[str]) -> Inert | Mapping[str, Any] | None:
    """The model in what was loaded: a module's stand-in, modules by name (Torch-Pruning), or None.

    Args:
        loaded: what the file holds.
        keys: under which tools put the model beside its tokenizer and numbers.
    """
    candidates = [loaded, *(loaded.get(key) for key in keys)] if isinstance(loaded, dict) else [loaded]
    for found in candidates:
        if isinstance(found, Inert) and _is_module(found.kept):
            return found
    flat = loaded.get(_FLAT_KEY) if isinstance(loaded, dict) else None
    if isinstance(flat, dict) and flat and all(_is_module(module) for module in flat.values()):
        return flat
    return None


def state_of(model: Inert | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names ``state_dict`` gives them.

    Raises:
        ValueError: a module occurs inside itself, or a parameter is no plain tensor.
    """
    state: dict[str, torch.Tensor] = {}
    modules = (
        _walk(model.kept)
        if isinstance(model, Inert)
        else ((f"{n}." if n else "", m) for n, m in model.items())
    )
    for prefix, module in modules:
        skipped = module.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, set) else set()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _items(module, kind):
                if tensor is None or (kind == "_buffers" and name in skipped):
                    continue
                if type(tensor) is not torch.Tensor:
                    raise ValueError(f"{prefix}{name} is no plain tensor")
                state[f"{prefix}{name}"] = tensor
    return state


def config_of(model: Inert | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``(path of the class, values)`` of the configuration object a model carries; empty if it has none."""
    top = model.kept if isinstance(model, Inert) else model.get("", {})
    config = top.get("config") if isinstance(top, dict) else None
    return (config.path, config.kept) if isinstance(config, Inert) else ("", {})


def _is_module(state: Any) -> bool:
    return isinstance(state, dict) and all(
        isinstance(state.get(key), dict) for key in ("_modules", "_parameters", "_buffers")
    )


def _items(module: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    entries = module.get(kind)
    return [(str(name), value) for name, value in entries.items()] if isinstance(entries, dict) else []


def _walk(root: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    waiting: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [("", root, (id(root),))]
    for _ in range(MAX_MODULES):
        if not waiting:
            return
        prefix, module, above = waiting.pop()
        yield prefix, module
        for name, child in _items(module, "_modules"):
            if not isinstance(child, Inert) or not _is_module(child.kept):
                continue
            if id(child.kept) in above:
                raise ValueError(f"module {prefix}{name} lies inside itself")
            waiting.append((f"{prefix}{name}.", child.kept, (*above, id(child.kept))))
    raise ValueError(f"it has over {MAX_MODULES} modules")
