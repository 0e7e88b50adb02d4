"""Perplexity with its protocol stated.

Text is cut into windows of ``context_length`` tokens that do not overlap; in each window every token but
the first is predicted from those before it. The last, shorter window counts too. Perplexities at
different context lengths must not be compared.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converters.activations import round_activations
from converters.checkpoint import open_checkpoint
from converters.train.corpus import read_documents
from converters.train.device import resolve_device
from converters.train.loading import load_model
from converters.train.packing import encode_documents
from converters.train.progress import RunProgress
from vllm_sparse.errors import FormatError, NumericsError, UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant

SCHEMA = "vllm-sparse/eval/1"
# exp of more overflows float64.
_LARGEST_NLL = 709.0


@dataclass(frozen=True)
class EvalResult:
    """Perplexity and what it was measured on.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood in nats per predicted token.
        tokens: predicted tokens.
        context_length: window length in tokens.
        activations: how linears rounded their inputs, as they do when served; ``none`` if no layer did.
    """

    perplexity: float
    context_length: int
    tokens: int
    nll: float
    activations: ActivationQuant = ActivationQuant.NONE

    def to_json(self) -> dict[str, Any]:
        """The ``vllm-sparse/eval/1`` object; it names activations only where they are rounded."""
        values = asdict(self)
        if self.activations is ActivationQuant.NONE:
            del values["activations"]
        return {"schema": SCHEMA, **values}


def windows(stream: Tensor, context_length: int) -> list[Tensor]:
    """Cut a token stream ``[tokens]`` as the module's text says; a last window of one token is dropped.

    Raises:
        FormatError: fewer than two tokens, or ``context_length`` below two.
    """
    if context_length < 2:
        raise FormatError(f"context_length is {context_length}; predicting needs at least 2")
    if stream.numel() < 2:
        raise FormatError(f"the text has {stream.numel()} tokens; perplexity needs at least 2")
    return [piece for piece in stream.long().split(context_length) if piece.numel() > 1]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    stream: Tensor,
    context_length: int,
    batch_tokens: int = 8192,
    on_progress: Callable[[int, int], object] | None = None,
) -> EvalResult:
    """Measure a Hugging Face causal language model on a token stream.

    Args:
        model: called as ``model(input_ids=..., use_cache=False).logits``, on whatever device it is.
        stream: ``[tokens]``.
        context_length: window length.
        batch_tokens: tokens per forward, rounded down to whole windows (at least one).
        on_progress: called with windows done and in all.

    Raises:
        NumericsError: the model's output is NaN or infinite.
    """
    pieces = windows(stream, context_length)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, done = 0.0, 0, 0
    for batch in _batches(pieces, max(1, batch_tokens // context_length)):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += float(losses.double().sum())
        count += losses.numel()
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(pieces))
    model.train(was_training)
    if not math.isfinite(total):
        raise NumericsError("the model's log-likelihood is NaN or infinite; its weights are damaged")
    nll = total / count
    if nll > _LARGEST_NLL:
        raise NumericsError(
            f"the mean negative log-likelihood is {nll:.0f} nats a token, beyond any perplexity that a "
            "number can hold; the model's weights are damaged"
        )
    return EvalResult(math.exp(nll), context_length, count, nll)


def unigram_perplexity(train: Tensor, stream: Tensor, context_length: int, vocab_size: int) -> float:
    """Perplexity of token frequencies alone (add-one smoothed), on the tokens :func:`perplexity` predicts.

    Args:
        train: ``[tokens]`` the frequencies come from.
        stream: ``[tokens]`` to predict.
        context_length: as given to :func:`perplexity`, so that the same tokens count.
        vocab_size: entries of the vocabulary.
    """
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1.0
    log_probability = (counts / counts.sum()).log()
    predicted = torch.cat([piece[1:] for piece in windows(stream, context_length)])
    return math.exp(-float(log_probability[predicted].mean()))


def _batches(pieces: list[Tensor], size: int) -> Iterator[Tensor]:
    full = [piece for piece in pieces if piece.numel() == pieces[0].numel()]
    for start in range(0, len(full), size):
        yield torch.stack(full[start : start + size])
    if len(full) < len(pieces):
        yield pieces[-1].unsqueeze(0)


def evaluate_directory(
    source: str,
    data: str,
    context_length: int,
    max_tokens: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> EvalResult:
    """Perplexity of a model directory or hub id on text, activations rounded as serving rounds them.

    Args:
        source: dense, structured or packed 2:4 model.
        data: file or directory (all of it), ``stdlib`` or dataset name (its held-out part).
        context_length: window length in tokens.
        max_tokens: stop after this many tokens of text.
        dtype: ``float32`` or ``bfloat16``, of weights and arithmetic.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    if dtype not in {"float32", "bfloat16"}:
        raise UnsupportedError(f"dtype {dtype!r}: use float32 or bfloat16")
    documents = read_documents(data)
    loaded = load_model(source, getattr(torch, dtype), resolve_device(device))
    activations = round_activations(loaded.model, open_checkpoint(loaded.directory))
    limit = loaded.config.get("max_position_embeddings")
    if limit is not None and context_length > limit:
        raise FormatError(
            f"context length {context_length} exceeds the model's {limit} positions; "
            f"pass --context-length {limit} or less"
        )
    stream = encode_documents(documents, loaded.tokenizer, max_tokens, loaded.vocab_size)
    with RunProgress("evaluating", max(1, len(windows(stream, context_length)))) as progress:
        result = perplexity(loaded.model, stream, context_length, on_progress=lambda n, _: progress.update(n))
    return replace(result, activations=activations)
