"""Training batches from a `datasets` stream: text that does not fit in memory, with a place to resume from.

Rows are tokenised as they come, each followed by the end token, and packed into sequences without padding.
What is left over when a batch is full waits for the next one; it and the stream's position are the state,
so that a resumed run sees the very same batches. Rows come in the stream's order, which corpora for
pre-training have shuffled; a stream that ends starts again.
"""

import functools
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converters.train.corpus import Document, is_heldout, parse_dataset_name
from vllm_sparse.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StreamedBatches:
    """Batches in order: batch *i* can be asked for only after batch *i - 1*, or after a resume at *i*.

    Args:
        source: ``NAME[:CONFIG[:COLUMN]]``, or a directory of parquet files.
        tokenizer: with an ``eos_token``.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        heldout_fraction: rows left out, by the rule of :func:`converters.train.corpus.load_corpus`, when
            the dataset has no split of its own to evaluate on.

    Raises:
        UnsupportedError: no `datasets` library, or a dataset that it cannot stream and resume.
    """

    def __init__(
        self,
        source: str,
        tokenizer: "PreTrainedTokenizerBase",
        sequence_length: int,
        batch_size: int,
        heldout_fraction: float,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise FormatError("the tokenizer has no eos_token; documents cannot be told apart. Set one.")
        self.tokenizer = tokenizer
        self.shape = (batch_size, sequence_length)
        self.name, config, self.column = parse_dataset_name(source)
        self._open = functools.partial(_train_stream, self.name, config, heldout_fraction)
        self._stream, self._heldout_fraction = self._open()
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._started = False
        self._row = 0
        self._left = torch.empty(0, dtype=torch.int32)
        self._next = 0

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in one batch."""
        return self.shape[0] * self.shape[1]

    def batch(self, index: int) -> Tensor:
        """int64 ``[batch_size, sequence_length]``.

        Raises:
            ValueError: out of order.
            FormatError: the stream holds less than one batch, or lacks the column.
        """
        if index != self._next:
            raise ValueError(f"a stream gives batch {self._next} next, not {index}")
        pieces, count = [self._left], self._left.numel()
        while count < self.tokens_per_batch:
            ids = self.tokenizer(self._text(), add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(torch.tensor([*ids, self.tokenizer.eos_token_id], dtype=torch.int32))
            count += len(pieces[-1])
        tokens = torch.cat(pieces)
        self._left = tokens[self.tokens_per_batch :].clone()
        self._next += 1
        return tokens[: self.tokens_per_batch].reshape(self.shape).long()

    def _text(self) -> str:
        """The next training row's text; starts over at the end."""
        if not self._started:
            self._rows, self._started = iter(self._stream), True
        fruitless = 0
        while True:
            row = next(self._rows, None)
            if row is None:
                fruitless += 1
                if fruitless > 1:
                    raise FormatError(f"dataset {self.name!r} has no training text in column {self.column!r}")
                # Opened anew: a stream that was resumed starts again from where it was resumed.
                self._stream, _ = self._open()
                self._rows, self._row = iter(self._stream), 0
                continue
            document = Document(f"{self.name}/train/{self._row}", str(self._value(row) or ""))
            self._row += 1
            if document.text and not is_heldout(document.name, self._heldout_fraction):
                return document.text

    def _value(self, row: dict[str, Any]) -> Any:
        if self.column not in row:
            raise FormatError(
                f"{self.name}/train has no column {self.column!r}; it has {', '.join(row)}. "
                "Name one: NAME:CONFIG:COLUMN"
            )
        return row[self.column]

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream and the tokens already read for the next batch; JSON-able."""
        return {
            "stream": self._stream.state_dict() if self._started else None,
            "row": self._row,
            "left": self._left.tolist(),
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self._row, self._next = state["row"], state["next"]
        self._left = torch.tensor(state["left"], dtype=torch.int32)
        self._started = False
        if state["stream"] is not None:
            self._stream.load_state_dict(state["stream"])


def _train_stream(name: str, config: str | None, heldout_fraction: float) -> tuple[Any, float]:
    """The training split as an iterable dataset, and the share of its rows to leave out."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UnsupportedError(
            "data.stream needs the `datasets` library: pip install 'vllm-sparse[train]'"
        ) from error
    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"the `datasets` library cannot load {name!r}: {error}") from error
    if "train" not in splits:
        raise FormatError(f"dataset {name!r} has no train split; it has {', '.join(splits)}")
    own_split = any(split in splits for split in ("validation", "test"))
    return splits["train"], 0.0 if own_split else heldout_fraction
