"""Byte-level BPE: any text is representable, and every tool that reads Hugging Face tokenizers loads it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_sparse.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int | None = None
) -> "PreTrainedTokenizerFast":
    """Learn a byte-level BPE vocabulary.

    Args:
        texts: training text.
        vocab_size: entries, the 256 bytes and ``<|endoftext|>`` (end, padding) among them.
        max_length: what the tokenizer states as the model's longest input.

    Returns:
        A fast tokenizer that adds no special tokens by itself and decodes to the exact input.

    Raises:
        FormatError: ``vocab_size`` is too small, or the text too short to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= _BYTES + 1:
        raise FormatError(f"vocab_size is {vocab_size}; byte-level BPE needs more than {_BYTES + 1}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise FormatError(
            f"the text yields only {tokenizer.get_vocab_size()} tokens of the {vocab_size} asked for; "
            "give more text or a smaller vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )
