"""Runs alone in a sandboxed process: opens one pickled file as tensors and data, and writes safetensors.

``python -m converters.pickle_worker IN OUT MEMORY``: OUT is a folder, which gets ``tensors.safetensors``
and ``facts.json`` (the numbers and strings that stood beside the tensors). The parent trusts neither.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

from converters import sandbox

CPU_SECONDS = 3600
MAX_DEPTH = 6
# Where training loops and pruning tools keep the model; optimizer and scheduler states are left behind.
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
#: Among the facts: class and values of the configuration that a pickled model object carried.
MODEL_CONFIG = "model_config"
# What a damaged or hostile file makes an unpickler raise.
_DAMAGE = (
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)
_SKIPPED = ("optimizer", "optimizers", "scheduler", "schedulers", "scaler", "rng", "teacher")


def find_state(value: Any) -> dict[str, Any]:
    """The dict of tensors in a checkpoint: itself, or under the usual keys, ``state.model`` included."""
    for _ in range(MAX_DEPTH):
        if not isinstance(value, dict):
            break
        if any(hasattr(item, "dtype") for item in value.values()):
            return value
        inner = next(
            (value[key] for key in (*_MODEL_KEYS, "state") if isinstance(value.get(key), dict)), None
        )
        if inner is None:
            break
        value = inner
    raise ValueError("no tensors found in it, nor under model or state_dict")


def plain_facts(value: Any, depth: int = 0) -> Any:
    """Numbers, strings and their lists and dicts; everything else is left out."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if depth >= MAX_DEPTH:
        return None
    if isinstance(value, dict):
        kept = {str(key): plain_facts(item, depth + 1) for key, item in value.items() if key not in _SKIPPED}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list | tuple) and len(value) < 10_000:
        return [plain_facts(item, depth + 1) for item in value]
    return None


def read_file(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a file and the plain values that stood beside them.

    A model object, which tensors-only loading refuses, is read as data; see :mod:`converters.inert_pickle`.

    Raises:
        pickle.UnpicklingError, ValueError, ...: it holds neither.
    """
    import torch

    from converters import inert_pickle

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        model = inert_pickle.find_model(inert_pickle.load_inert(source), _MODEL_KEYS)
        if model is None:
            raise
        path, values = inert_pickle.config_of(model)
        values = {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
        }
        return inert_pickle.state_of(model), {MODEL_CONFIG: {"class": path, "values": plain_facts(values)}}
    others = {name: value for name, value in loaded.items() if not isinstance(value, torch.Tensor)}
    return find_state(loaded), plain_facts(
        {name: value for name, value in others.items() if name not in (*_MODEL_KEYS, "state")}
    )


def main(source: Path, out: Path, memory: int) -> int:
    """Convert one file; 3 when it is neither tensors nor a model."""
    import torch
    from safetensors.torch import save_file

    missing = sandbox.enter(out, memory, CPU_SECONDS, 1 << 46)
    try:
        state, facts = read_file(source)
    except (*_DAMAGE, pickle.UnpicklingError) as error:
        sys.stderr.write(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n")
        return 3
    tensors = {
        str(name): tensor.detach().contiguous().clone()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    }
    save_file(tensors, out / "tensors.safetensors", metadata={"format": "pt"})
    written = json.dumps({"facts": facts, "sandbox_missing": missing})
    (out / "facts.json").write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
