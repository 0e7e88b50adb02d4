"""Open a model directory for evaluation or compression: dense, structured, or packed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from converters.checkpoint import open_checkpoint
from converters.config_json import without_compression
from converters.hf import load_for_evaluation, model_class_of, read_tokenizer
from vllm_sparse.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; a tokenizer may use fewer."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])


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
        UnsupportedError: an unknown format or family.
    """
    checkpoint = open_checkpoint(source)
    model = load_for_evaluation(checkpoint.path, dtype, device)
    tokenizer = read_tokenizer(checkpoint.path)
    config = dict(without_compression(checkpoint.config))
    return LoadedModel(model, tokenizer, config, checkpoint.path, _disk_dtype(config))


def model_config(source: str | Path) -> dict[str, Any]:
    """Raw ``config.json`` of a model directory or hub id."""
    return dict(open_checkpoint(source).config)


def structure_on_meta(source: str | Path) -> "PreTrainedModel":
    """The model's modules and shapes without memory for weights."""
    model_class, config = model_class_of(open_checkpoint(source))
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    return model


def _disk_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"config.json says dtype {name!r}, which torch does not know")
    return found
