"""Documents to packed token sequences, and batches that are a pure function of the step number."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from converters.hf import check_vocabulary
from converters.train.corpus import Document
from vllm_sparse.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODE_CHUNK = 16


def encode_documents(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Concatenate documents, each that ends followed by the end token.

    Args:
        documents: read in order.
        tokenizer: a Hugging Face tokenizer with an ``eos_token``.
        max_tokens: stop after this many.
        vocab_size: rows of the embedding that the tokens are for; not checked without it.

    Returns:
        int32 ``[tokens]``.

    Raises:
        FormatError: no ``eos_token``, or a token that the embedding has no row for.
    """
    if tokenizer.eos_token_id is None:
        raise FormatError("the tokenizer has no eos_token; documents cannot be told apart. Set one.")
    pieces: list[Tensor] = []
    total = 0
    pending: list[Document] = []

    def flush() -> int:
        if not pending:
            return 0
        added = 0
        encoded = tokenizer([d.text for d in pending], add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(pending, encoded, strict=True):
            end = [tokenizer.eos_token_id] if document.ends else []
            pieces.append(torch.tensor([*ids, *end], dtype=torch.int32))
            added += len(pieces[-1])
        pending.clear()
        return added

    for document in documents:
        pending.append(document)
        if len(pending) == _ENCODE_CHUNK:
            total += flush()
            if max_tokens is not None and total >= max_tokens:
                break
    flush()
    stream = (torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32))[:max_tokens]
    if vocab_size is not None and stream.numel():
        check_vocabulary(int(stream.max()), vocab_size, tokenizer.name_or_path or "the model")
    return stream


def scattered(documents: Iterable[Document], characters: int, seed: int) -> list[Document]:
    """Documents cut at line breaks into pieces, in an order drawn with ``seed``.

    The first pieces are a sample of the whole text, where the first documents would be a few of its subjects.

    Args:
        documents: in a fixed order.
        characters: shortest piece but for a document's last; the longest is twice that.
        seed: of the order.
    """
    pieces = [piece for document in documents for piece in _cut(document, characters)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[i] for i in order.tolist()]


def _cut(document: Document, characters: int) -> Iterator[Document]:
    text, start = document.text, 0
    while len(text) - start > 2 * characters:
        line = text.find("\n", start + characters, start + 2 * characters)
        end = line + 1 if line >= 0 else start + characters
        yield Document(f"{document.name}:{start}", text[start:end], ends=False)
        start = end
    yield Document(f"{document.name}:{start}" if start else document.name, text[start:], document.ends)


def pack_sequences(stream: Tensor, sequence_length: int) -> Tensor:
    """Cut ``[tokens]`` into ``[n, sequence_length]``; the remainder is dropped.

    Raises:
        FormatError: the stream is shorter than one sequence.
    """
    count = stream.numel() // sequence_length
    if count == 0:
        raise FormatError(
            f"the text has {stream.numel()} tokens, shorter than one sequence of {sequence_length}; "
            "give more text or a shorter sequence_length"
        )
    return stream[: count * sequence_length].reshape(count, sequence_length)


class Batches(Protocol):
    """Training data by step number."""

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in one batch."""

    def batch(self, index: int) -> Tensor:
        """int64 ``[batch_size, sequence_length]``."""


@runtime_checkable
class StatefulBatches(Batches, Protocol):
    """Data whose position is saved with a run's checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""


class PackedBatches:
    """Random batches without replacement inside an epoch.

    Which sequences batch *i* holds depends on (seed, i) alone, so a resumed run sees the very same data
    without any state to save.
    """

    def __init__(self, sequences: Tensor, batch_size: int, seed: int) -> None:
        if sequences.shape[0] < batch_size:
            raise FormatError(
                f"the text has {sequences.shape[0]} sequences of {sequences.shape[1]} tokens, fewer than one "
                f"batch of {batch_size}; give more text, shorter sequences or a smaller batch"
            )
        self.sequences = sequences
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = sequences.shape[0] // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in one batch."""
        return self.batch_size * self.sequences.shape[1]

    def batch(self, index: int) -> Tensor:
        """int64 ``[batch_size, sequence_length]``."""
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.sequences.shape[0], generator=generator)
            self._epoch = epoch
        rows = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        return self.sequences[rows].long()
