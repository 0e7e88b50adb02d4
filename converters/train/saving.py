"""Write a model in memory as a Hugging Face directory that vLLM and transformers read."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converters.train.output import write_json
from converters.train.requant import OutlierLinear, pack_outliers
from converters.train.slorb import pack_branches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What belongs to a tokenizer or to generation, copied byte for byte beside changed weights.
_SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def save_model(
    model: "PreTrainedModel",
    directory: Path,
    dtype: torch.dtype,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Save weights in ``dtype`` with config and tokenizer; the model in memory keeps its own dtype."""
    import transformers

    state = _untied_state(model, dtype)
    packed = pack_branches(model, state, dtype) or pack_outliers(model, state, dtype)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(directory, state_dict=state)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    # transformers writes the dtype of the model in memory.
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", config | ({"quantization_config": packed} if packed else {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def save_like(
    model: "PreTrainedModel", directory: Path, source: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Save changed weights of a model that was loaded from ``source``.

    Args:
        model: its weights.
        directory: target, empty.
        source: where tokenizer and generation files are copied from.
        config: written as ``config.json`` in place of the model's own.
        dtype: of the saved weights.
    """
    save_model(model, directory, dtype)
    saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kept = {name: saved[name] for name in ("dtype", "quantization_config") if name in saved}
    if "torch_dtype" in config:  # the older name of dtype; it must not go on stating the source's
        kept["torch_dtype"] = saved["dtype"]
    write_json(directory / "config.json", {**config, **kept})
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _untied_state(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, Tensor]:
    """State in ``dtype`` with each shared tensor once, under its first name (the embedding's)."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor.detach().to("cpu", dtype)
    return state


def round_weights(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Round weights in place to what ``dtype`` can hold, so that what is measured is what is saved.

    Of split linears the exact weights are stored in ``dtype``; the base is int4 with float32 scales.
    """
    split = [module for module in model.modules() if isinstance(module, OutlierLinear)]
    bases = {id(module.weight) for module in split}
    stored = [p for p in model.parameters() if id(p) not in bases]
    with torch.no_grad():
        for tensor in (*stored, *(module.outliers for module in split)):
            tensor.copy_(tensor.to(dtype).to(tensor.dtype))
