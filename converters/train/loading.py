"""Open a model directory for evaluation or compression: dense, structured, or packed 2:4."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converters.train.structured import read_layer_shapes, structured_class
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.families import FAMILIES
from vllm_sparse.sparse24 import decompress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUANT_KEYS = ("quantization_config", "compression_config")
_STOCK_KEYS_DROPPED = (
    *_QUANT_KEYS,
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "architectures",
)


@dataclass
class LoadedModel:
    """A model in memory and the files it came from.

    Attributes:
        model: in eval mode, all weights dense.
        tokenizer: the directory's own.
        config: raw ``config.json`` without what described packed weights.
        directory: local folder.
        dtype: the weights' data type on disk.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    config: dict[str, Any]
    directory: Path
    dtype: torch.dtype


def load_model(
    source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a model directory, or a hub id, with its tokenizer.

    Args:
        source: a folder with ``config.json`` and safetensors, or a Hugging Face hub id.
        dtype: of the weights in memory.
        device: where to put them.

    Raises:
        FormatError: files are missing, damaged or contradict each other.
        UnsupportedError: a quantised or unknown format.
    """
    import transformers

    directory = _local_directory(source)
    raw = _read_config(directory)
    config = {key: value for key, value in raw.items() if key not in _QUANT_KEYS}
    model = _build(raw, directory, dtype, transformers)
    model.to(device).eval()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{directory} has no readable tokenizer: {error}") from error
    return LoadedModel(model, tokenizer, config, directory, _disk_dtype(raw))


def load_model_only(
    directory: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> "PreTrainedModel":
    """As :func:`load_model`, for directories without a tokenizer."""
    import transformers

    return _build(_read_config(directory), directory, dtype, transformers).to(device).eval()


def model_config(source: str | Path) -> dict[str, Any]:
    """Raw ``config.json`` of a model directory or hub id."""
    return _read_config(_local_directory(source))


def structure_on_meta(source: str | Path) -> "PreTrainedModel":
    """The model's modules and shapes without memory for weights."""
    import transformers

    model_class, config = _model_class(model_config(source), transformers)
    with torch.device("meta"):
        return model_class(config)


def _local_directory(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FormatError(f"{source} is not a model directory; give a folder with config.json, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FormatError(f"{source} is neither a folder here nor a model the hub gives: {error}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{directory} has no config.json; it is not a model directory") from error
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise FormatError(f"{path} does not name a model_type")
    return config


def _disk_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"config.json says dtype {name!r}, which torch does not know")
    return found


def _model_class(raw: dict[str, Any], transformers: Any) -> tuple[type["PreTrainedModel"], Any]:
    """The class to build, with per-layer shapes when config.json has them, and its config."""
    architectures = raw.get("architectures") or []
    config = transformers.AutoConfig.for_model(
        **{k: v for k, v in raw.items() if k not in _STOCK_KEYS_DROPPED}
    )
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise UnsupportedError(
            f"model_type {raw['model_type']!r} has no causal language model in transformers"
        )
    # The plugin's name stands for the stock class with per-layer shapes.
    family = FAMILIES.get(raw["model_type"])
    known = {model_class.__name__} | ({family.architecture} if family else set())
    if architectures and architectures[0] not in known:
        raise UnsupportedError(
            f"config.json names the architecture {architectures[0]}; for model_type "
            f"{raw['model_type']!r} only {model_class.__name__} is read here"
        )
    if raw.get("per_layer_config"):
        model_class = structured_class(model_class, read_layer_shapes(raw))
    return model_class, config


def _build(raw: dict[str, Any], directory: Path, dtype: torch.dtype, transformers: Any) -> "PreTrainedModel":
    quant = next((raw[key] for key in _QUANT_KEYS if raw.get(key)), None)
    model_class, config = _model_class(raw, transformers)
    state = _packed_state(quant, directory) if quant is not None else _plain_state(directory)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise FormatError(f"{directory}: the weights do not fit config.json: {error}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise FormatError(
            f"{directory} lacks {len(missing)} weights that config.json asks for, {missing[0]} first"
        )
    return model


def _plain_state(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{directory} holds no *.safetensors file; convert the checkpoint first")
    for path in files:
        try:
            state.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
    return state


def _packed_state(quant: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    """Dense weights of a 16- or 32-bit `sparse-24-bitmask` checkpoint."""
    sparsity = quant.get("sparsity_config") or {}
    if quant.get("config_groups") or sparsity.get("format") not in {"sparse-24-bitmask", "dense"}:
        raise UnsupportedError(
            f"{directory} is quantised (format {quant.get('format')}, sparsity {sparsity.get('format')}); "
            "turn it into a dense model with `vllm-sparse convert --to dense` first"
        )
    state = _plain_state(directory)
    for name in [key.removesuffix(".compressed") for key in state if key.endswith(".compressed")]:
        values, bitmask = state.pop(f"{name}.compressed"), state.pop(f"{name}.bitmask", None)
        shape = state.pop(f"{name}.shape", None)
        if bitmask is None or shape is None:
            raise FormatError(f"{directory}: {name} has compressed values but no bitmask or no shape")
        dense = decompress(values, bitmask)
        if shape.flatten().tolist() != list(dense.shape):
            raise FormatError(
                f"{directory}: {name} declares shape {shape.flatten().tolist()} and holds {list(dense.shape)}"
            )
        state[f"{name}.weight"] = dense
    return state
