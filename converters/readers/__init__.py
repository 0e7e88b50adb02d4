"""One reader per input format, and the choice between them."""

from collections.abc import Callable

from converters.checkpoint import Checkpoint
from converters.config_json import Compression
from converters.readers.base import Entry, Loaded, Reader
from converters.readers.gptq_marlin24 import is_gptq_marlin24
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.quantization.spec import QuantFormat, SparsityFormat

__all__ = ["FORMATS", "Entry", "Loaded", "Reader", "detect_format", "make_reader"]

# Checkpoints of training loops; never detected, because nothing in them says which one it was.
TRAINED_FORMATS = ("nanogpt", "ast", "2by4")
# MaskLLM's masks lie next to a dense model.
MASK_FILE = "mask_compressed.npz"
FORMATS = (
    "auto",
    "dense",
    "sparse-24-bitmask",
    "sparse24",
    "sparse-bitmask",
    "marlin-24",
    "gptq-marlin-24",
    "maskllm",
    *TRAINED_FORMATS,
)


def detect_format(checkpoint: Checkpoint) -> str:
    """The input format, from config.json and tensor names; which of them decides is in docs/convert.md."""
    compression = Compression(checkpoint.config)
    if compression.method == "sparse24":
        return "sparse24"
    if is_gptq_marlin24(compression.raw):
        return "gptq-marlin-24"
    if QuantFormat.MARLIN_24 in compression.formats:
        return "marlin-24"
    if compression.sparsity_format is SparsityFormat.SPARSE_24_BITMASK:
        return "sparse-24-bitmask"
    if compression.sparsity_format is SparsityFormat.SPARSE_BITMASK:
        return "sparse-bitmask"
    if (checkpoint.path / MASK_FILE).is_file():
        return "maskllm"
    return "dense"


def make_reader(checkpoint: Checkpoint, name: str = "auto") -> Reader:
    """The reader for ``name``; ``auto`` detects it.

    Raises:
        UnsupportedError: no such format.
    """
    from converters.readers.bitmask import BitmaskReader
    from converters.readers.bitmask24 import Bitmask24Reader
    from converters.readers.dense import DenseReader
    from converters.readers.gptq_marlin24 import GptqMarlin24Reader
    from converters.readers.marlin24 import Marlin24Reader
    from converters.readers.maskllm import MaskLLMReader
    from converters.readers.sparse24 import Sparse24Reader

    makers: dict[str, Callable[[Checkpoint], Reader]] = {
        "dense": lambda c: DenseReader(c, trust_claims=name == "auto"),
        "sparse-24-bitmask": Bitmask24Reader,
        "sparse24": Sparse24Reader,
        "sparse-bitmask": BitmaskReader,
        "marlin-24": Marlin24Reader,
        "gptq-marlin-24": GptqMarlin24Reader,
        "maskllm": MaskLLMReader,
    }
    if name in TRAINED_FORMATS:
        from converters.readers.trained import TrainedReader

        return TrainedReader(checkpoint, name)
    chosen = detect_format(checkpoint) if name == "auto" else name
    if chosen not in makers:
        raise UnsupportedError(f"unknown format {chosen!r}; allowed: auto, {', '.join(makers)}")
    return makers[chosen](checkpoint)
