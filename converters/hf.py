"""Transformers models from any readable checkpoint, weights decompressed: for checks, not for serving."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.config_json import without_compression
from converters.readers import Reader, make_reader
from converters.readers.base import dense_numbers
from converters.writers.dense import disk_layout
from vllm_sparse.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Ours: transformers must not see them, its own classes would refuse or misread them.
_PLUGIN_KEYS = ("per_layer_config", "allow_global_per_layer_attribute_access", "architectures", "auto_map")
# Not in Transformers: Llama's attention, and V2's experts.
_DEEPSEEK_V1 = "deepseek"
_HETEROGENEITY = "transformers.integrations.heterogeneity.configuration_utils"
# Any tokenizer tells these apart.
_TEXTS = ("def main():", "Water boils at 100 degrees.", "It was the best of times")
_TOKENIZER_HINT = "copy the original model's tokenizer.json and tokenizer_config.json there"


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, by transformers; code that the checkpoint brings is not run.

    Raises:
        FormatError: none, a broken one, or one that needs code. Transformers makes an empty tokenizer of
            many model types where the files are missing; that counts as none.
    """
    import transformers

    # It reads config.json too, and warns of each value that some layer overrides. Nothing here reads those.
    logging.getLogger(_HETEROGENEITY).setLevel(logging.ERROR)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        made = {tuple(tokenizer(text).input_ids) for text in _TEXTS}
    # The tokenizers library raises Exception itself.
    except Exception as error:
        raise FormatError(
            f"{folder} has no usable tokenizer; {_TOKENIZER_HINT} ({_first_line(error)})"
        ) from error
    if len(made) < len(_TEXTS):
        raise FormatError(
            f"{folder} has no usable tokenizer: it makes the same tokens of different texts, as one without "
            f"its files does; {_TOKENIZER_HINT}"
        )
    return tokenizer


def check_vocabulary(largest: int, vocab_size: int, where: str | Path) -> None:
    """Refuse tokens that an embedding of ``vocab_size`` rows has no row for.

    Raises:
        FormatError: naming ``where`` the tokenizer is.
    """
    if largest >= vocab_size:
        raise FormatError(
            f"{where}: the tokenizer gives token {largest}, and the model's embedding has {vocab_size} rows: "
            "the tokenizer files belong to another model"
        )


def _first_line(error: Exception) -> str:
    # Transformers' first line may introduce a list that follows: "... from one of: ".
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")


def dense_state(reader: Reader, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under its dense name, packed weights unpacked and dequantised.

    Args:
        reader: of the checkpoint.
        dtype: of all float tensors in the result.

    Raises:
        FormatError: broken input.
        NumericsError: NaN or Inf.
    """
    state: dict[str, Tensor] = {}
    for entry in reader.entries():
        loaded = reader.load(entry)
        weight = disk_layout(entry, dense_numbers(entry, loaded))
        # A copy, so that nothing in the model depends on the mapped file.
        state[entry.name] = weight.to(dtype, copy=True) if weight.is_floating_point() else weight.clone()
    return state


def load_for_evaluation(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> "PreTrainedModel":
    """A transformers model with the checkpoint's weights, all dense, in eval mode.

    Canonical 2:4 checkpoints are decompressed and dequantised; structured ones (``per_layer_config``) are
    built layer by layer from their own shapes. No code from the checkpoint runs.

    Args:
        path: checkpoint folder or hub id.
        dtype: of the weights in memory.
        device: where the model goes.

    Raises:
        FormatError: broken input, or weights that do not fit config.json.
        UnsupportedError: a format or a model family that is not read here.
    """
    checkpoint = open_checkpoint(path)
    reader = make_reader(checkpoint)
    model_class, config = model_class_of(checkpoint)
    state = dense_state(reader, dtype)
    if checkpoint.config.get("model_type") == _DEEPSEEK_V1:
        from converters.hf_layers import fuse_experts

        state = fuse_experts(state)
    return build_model(model_class, config, state, dtype, checkpoint.path).to(device).eval()


def model_class_of(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """``(class, config)`` of a checkpoint's causal language model, with per-layer shapes where it has them.

    Raises:
        FormatError: config.json names no model_type, or per-layer shapes that make no sense.
        UnsupportedError: transformers has no such causal language model.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    raw = checkpoint.config
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise FormatError(f"{checkpoint.path}/config.json names no model_type")
    stock = {key: value for key, value in without_compression(raw).items() if key not in _PLUGIN_KEYS}
    if model_type == _DEEPSEEK_V1:
        from converters.hf_layers import layered_class

        config = transformers.LlamaConfig(**{key: v for key, v in stock.items() if key != "model_type"})
        return layered_class(transformers.LlamaForCausalLM, raw), config
    try:
        config = transformers.AutoConfig.for_model(**stock)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise UnsupportedError(
            f"transformers cannot read the config of model_type {model_type!r}: {said}"
        ) from error
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise UnsupportedError(f"transformers has no causal language model of type {model_type!r}")
    if raw.get("per_layer_config"):
        from converters.hf_layers import layered_class
        from converters.train.moe import MOE_FAMILIES, structured_moe_class
        from converters.train.structured import STRUCTURED_FAMILIES, read_layer_shapes, structured_class

        if model_type in MOE_FAMILIES:
            model_class = structured_moe_class(model_class, dict(raw))
        elif model_type in STRUCTURED_FAMILIES:
            model_class = structured_class(model_class, read_layer_shapes(dict(raw)))
        else:
            model_class = layered_class(model_class, raw)
    return model_class, config


def build_model(
    model_class: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype, where: Path
) -> "PreTrainedModel":
    """Put ``state`` into a new model of ``model_class``.

    Raises:
        FormatError: a weight is missing, left over, or has another shape than the config says, or the config
            describes no model.
    """
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise FormatError(f"{where}: the weights do not fit config.json: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # What transformers raises for a value it does not know, such as an activation function.
        raise FormatError(
            f"{where}: transformers builds no model of config.json: {type(error).__name__}: {error}"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown")):
        names = sorted(report[kind])
        if names:
            raise FormatError(f"{where} {what} weights for its config.json: {', '.join(names[:3])}")
    return model
