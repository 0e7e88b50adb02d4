"""``vllm-sparse verify A B``: do two checkpoints hold the same weights and compute the same thing?

Tensors are compared through the readers, so packed and dense storage meet in one form. Where nothing was
quantised they must be equal; where B's linears are quantised, A's zeros must still be zero, the rest must be
rounded from A's values, and the logits tell what that changes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.checkpoint import open_checkpoint
from converters.hf import check_vocabulary, load_for_evaluation, read_tokenizer
from converters.quantize import spacing
from converters.readers import Entry, Loaded, Reader, make_reader
from converters.readers.base import dense_numbers, dequantize
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.sparse24 import nonzero_mask

SCHEMA = "vllm-sparse/verify/1"
# Equal weights computed in the same order give equal logits; this allows for another order.
EXACT_KL = 1e-6
QUANTIZED_KL = 0.1
# Distance from the unquantised values, root mean square of a row in steps of the format. Rounding to nearest
# gives 0.29 and at most 0.5 for any value; GPTQ, which makes up for errors in later columns, 0.3 to 0.55.
MAX_ROW_STEPS = 1.0
MAX_TOKENS = 512
_SEED = 0
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at a lower temperature on a mountain because",
    "In 1969 the first people landed on the Moon. Their names were",
)
# Of which --align rounds up the widths.
_CHANNELS = re.compile(r"\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(weight|bias)$")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    Attributes:
        tensors_checked: logical tensors compared.
        tensors_equal: those that hold the same numbers.
        tensors_quantized: those that differ by rounding because only one side is quantised, zeros preserved.
        different: names of the others, missing ones included.
        kl_mean: mean KL(A || B) in nats per position; None when logits were not compared.
        top1_agreement: share of positions with the same most likely token.
        max_abs_diff: largest difference of two logits.
        positions: compared positions.
        max_rounding_steps: largest distance of a value of those from the unquantised one, in steps of its
            format: at most 0.5 where it was rounded to nearest; None without quantised tensors.
        ok: whether the check passed.
        notes: where the logits' tokens are from.
        tensors_padded: feed-forward tensors that one side has with more channels, all of them zero.
    """

    tensors_checked: int
    tensors_equal: int
    tensors_quantized: int
    different: tuple[str, ...]
    kl_mean: float | None
    top1_agreement: float | None
    max_abs_diff: float | None
    positions: int
    max_rounding_steps: float | None
    ok: bool
    notes: tuple[str, ...] = field(default=())
    tensors_padded: int = 0

    def as_json(self) -> dict[str, Any]:
        """The ``vllm-sparse/verify/1`` object."""
        return {"schema": SCHEMA, **asdict(self)}


@dataclass
class TensorComparison:
    """Running result of :func:`compare_tensors`."""

    checked: int = 0
    equal: int = 0
    quantized: int = 0
    padded: int = 0
    max_steps: float = 0.0
    different: list[str] = field(default_factory=list)


def same_numbers(one: Tensor, two: Tensor) -> bool:
    """Equal values, whatever the float dtypes; -0.0 equals 0.0."""
    if one.shape != two.shape:
        return False
    if one.dtype == two.dtype and one.element_size() > 1:
        return bool((one == two).all())
    return torch.equal(one.to(torch.float32), two.to(torch.float32))


def same_but_padded(name: str, one: Tensor, two: Tensor) -> bool:
    """Whether two forms of a feed-forward tensor differ by channels of zeros at the end; those do nothing."""
    if not _CHANNELS.search(name) or one.ndim != two.ndim:
        return False
    small, large = (one, two) if one.numel() < two.numel() else (two, one)
    if any(n > m for n, m in zip(small.shape, large.shape, strict=True)):
        return False
    corner = large[tuple(slice(n) for n in small.shape)]
    return same_numbers(small, corner) and bool((large != 0).sum() == (corner != 0).sum())


def rounding_steps(a: tuple[Entry, Loaded], b: tuple[Entry, Loaded]) -> tuple[float, float]:
    """How far two forms of a weight are apart, in steps of the coarser format.

    Returns:
        Root mean square of the worst row, and the largest of all.
    """
    steps = torch.zeros(())
    for entry, loaded in (a, b):
        if entry.quantized:
            own = dequantize(spacing(loaded.weight), loaded.scale(entry), entry.group_size).abs()
            steps = torch.maximum(steps, own)
    distance = (dense_numbers(*a).to(torch.float32) - dense_numbers(*b)).abs_()
    # Where the scale is 0 no value but 0 can be meant, and any other is infinitely many steps away.
    distance = torch.where(distance == 0, distance, distance / steps)
    if not distance.numel():
        return 0.0, 0.0
    return float(distance.square().mean(-1).sqrt().max()), float(distance.max())


def _compare_entry(a: tuple[Entry, Loaded], b: tuple[Entry, Loaded]) -> tuple[str, float]:
    """``equal``, ``padded``, ``quantized`` or ``different``; and the largest distance in steps."""
    (entry_a, loaded_a), (entry_b, loaded_b) = a, b
    if entry_a.shape != entry_b.shape:
        numbers = dense_numbers(entry_a, loaded_a), dense_numbers(entry_b, loaded_b)
        return ("padded" if same_but_padded(entry_a.name, *numbers) else "different"), 0.0
    numbers_a, numbers_b = dense_numbers(entry_a, loaded_a), dense_numbers(entry_b, loaded_b)
    if entry_a.quantized is entry_b.quantized:
        return ("equal" if same_numbers(numbers_a, numbers_b) else "different"), 0.0
    # A dequantised twin is the quantised numbers rounded to its own dtype.
    plain, other = (numbers_a, numbers_b) if entry_b.quantized else (numbers_b, numbers_a)
    if same_numbers(other.to(plain.dtype), plain):
        return "equal", 0.0
    kept = bool((nonzero_mask(plain) | ~nonzero_mask(other)).all())
    row, largest = rounding_steps(a, b)
    return ("quantized" if kept and row <= MAX_ROW_STEPS else "different"), largest


def compare_tensors(a: Reader, b: Reader, progress: Progress | None = None) -> TensorComparison:
    """Compare two checkpoints tensor by tensor, a pair in memory at a time.

    Raises:
        FormatError: one of them is broken.
    """
    entries_a = {entry.name: entry for entry in a.entries()}
    entries_b = {entry.name: entry for entry in b.entries()}
    result = TensorComparison(different=sorted(set(entries_a) ^ set(entries_b)))
    result.checked = len(result.different)
    common = [name for name in entries_a if name in entries_b]
    for done, name in enumerate(common, 1):
        entry_a, entry_b = entries_a[name], entries_b[name]
        outcome, steps = _compare_entry((entry_a, a.load(entry_a)), (entry_b, b.load(entry_b)))
        result.checked += 1
        if outcome == "different":
            result.different.append(name)
        elif outcome == "equal":
            result.equal += 1
        elif outcome == "padded":
            result.padded += 1
        else:
            result.quantized += 1
            result.max_steps = max(result.max_steps, steps)
        if progress is not None:
            progress("tensors", done, len(common))
    return result


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file, one per line; empty lines are skipped.

    Raises:
        FormatError: not UTF-8 text, or no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise FormatError(f"{path} holds no prompt; write one per line")
    return prompts


def token_rows(folder: Path, config: Any, prompts: Sequence[str]) -> tuple[list[Tensor], str]:
    """Token ids ``[tokens]`` per prompt, and a note saying where they come from.

    Without a usable tokenizer, fixed pseudo-random tokens are used; that suffices to compare two models.

    Raises:
        FormatError: prompts were given but the tokenizer is missing, broken or another model's.
    """
    text = config.get("text_config")
    sizes = text if isinstance(text, Mapping) and text else config
    vocabulary = _count(sizes, ("vocab_size",))
    length = min(MAX_TOKENS, _count(sizes, ("max_position_embeddings", "n_positions")) or MAX_TOKENS)
    try:
        texts = prompts or PROMPTS
        plural = "" if len(texts) == 1 else "s"
        return _tokens(folder, texts, length, vocabulary), f"{len(texts)} prompt{plural}"
    except FormatError as error:
        if prompts:
            raise FormatError(f"--prompts cannot be used: {error}") from error
    if not vocabulary:
        raise FormatError(f"{folder}/config.json names no vocab_size")
    generator = torch.Generator().manual_seed(_SEED)
    rows = [torch.randint(vocabulary, (min(64, length),), generator=generator) for _ in range(8)]
    return rows, "no usable tokenizer: random tokens"


def _count(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The first positive whole number under one of the keys, 0 without any."""
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), 0)


def _tokens(folder: Path, texts: Sequence[str], length: int, vocabulary: int) -> list[Tensor]:
    """Token ids of the texts, at most ``length`` each; those without a token are left out."""
    tokenizer = read_tokenizer(folder)
    made = [torch.tensor(tokenizer(text).input_ids[:length], dtype=torch.int64) for text in texts]
    rows = [row for row in made if row.numel()]
    if not rows:
        raise FormatError(f"{folder}: its tokenizer makes no token of any of the texts")
    top = max(int(row.max()) for row in rows)
    if vocabulary:
        check_vocabulary(top, vocabulary, folder)
    return rows


@torch.no_grad()
def _logits(path: Path, rows: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    model = load_for_evaluation(path, dtype)
    if len({row.numel() for row in rows}) == 1:
        return list(model(input_ids=torch.stack(list(rows)), use_cache=False).logits.float())
    return [model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float() for row in rows]


def compare_logits(
    a: Path, b: Path, rows: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> tuple[float, float, float, int]:
    """``(mean KL(A || B), top-1 agreement, max |difference|, positions)``; one model in memory at a time.

    Raises:
        FormatError: the models do not share a vocabulary, or weights do not fit their config.
    """
    first = _logits(a, rows, dtype)
    second = _logits(b, rows, dtype)
    if first[0].shape != second[0].shape:
        raise FormatError(
            f"the models give logits of {first[0].shape[-1]} and {second[0].shape[-1]} tokens; they cannot "
            "be compared"
        )
    one, two = torch.cat(first), torch.cat(second)
    logp, logq = one.log_softmax(-1), two.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).clamp_min(0)
    top1 = (one.argmax(-1) == two.argmax(-1)).float().mean()
    return float(kl.mean()), float(top1), float((one - two).abs().max()), one.shape[0]


def verify(
    a: str | Path,
    b: str | Path,
    prompts: Sequence[str] = (),
    *,
    logits: bool = True,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare two checkpoints.

    Args:
        a: the reference, a folder or hub id.
        b: the candidate.
        prompts: texts to compare logits on; a few built-in ones when empty.
        logits: compare logits too, in float32 with transformers.
        max_kl: largest mean KL that passes; by default 1e-6, and 0.1 when only one side is quantised.
        progress: called with phase, done, total.

    Raises:
        FormatError: a checkpoint is broken or cannot be built.
    """
    checkpoint_a, checkpoint_b = open_checkpoint(a), open_checkpoint(b)
    tensors = compare_tensors(make_reader(checkpoint_a), make_reader(checkpoint_b), progress)
    limit = max_kl if max_kl is not None else (QUANTIZED_KL if tensors.quantized else EXACT_KL)
    kl = top1 = diff = None
    positions = 0
    notes: list[str] = []
    if logits:
        rows, note = token_rows(checkpoint_a.path, checkpoint_a.config, prompts)
        notes.append(note)
        if progress is not None:
            progress("logits", 0, 1)
        try:
            kl, top1, diff, positions = compare_logits(checkpoint_a.path, checkpoint_b.path, rows)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error} Use --no-logits to compare the tensors alone.") from error
        if progress is not None:
            progress("logits", 1, 1)
    passed = not tensors.different and (kl is None or kl <= limit)
    return Verification(
        tensors_checked=tensors.checked,
        tensors_equal=tensors.equal,
        tensors_quantized=tensors.quantized,
        different=tuple(tensors.different),
        kl_mean=kl,
        top1_agreement=top1,
        max_abs_diff=diff,
        positions=positions,
        max_rounding_steps=tensors.max_steps if tensors.quantized else None,
        ok=passed,
        notes=tuple(notes),
        tensors_padded=tensors.padded,
    )
