"""Train a small Llama or Qwen3 from scratch on real text."""

import copy
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from converters.hf import load_for_evaluation
from converters.launch import launched_rank
from converters.train import parallel
from converters.train.corpus import load_corpus
from converters.train.device import autocast, resolve_device, resolve_precision
from converters.train.evaluate import EvalResult, perplexity, unigram_perplexity
from converters.train.loop import LoopSettings, finish_run, run_loop, start_run
from converters.train.models import build_model
from converters.train.optim import adamw, lr_at, next_token_loss, set_lr
from converters.train.output import atomic_directory, check_free, clear_leftovers, write_json
from converters.train.packing import Batches, PackedBatches, encode_documents, pack_sequences
from converters.train.recipes import OptimiserRecipe, TrainRecipe
from converters.train.saving import save_model
from converters.train.streaming import StreamedBatches
from converters.train.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SUMMARY = "training.json"


@dataclass(frozen=True)
class TrainResult:
    """A trained model on disk and how good it is.

    Attributes:
        directory: the saved model.
        evaluation: held-out perplexity of the *saved* weights (rounded to their dtype), in float32.
        perplexity_unigram: token frequencies' perplexity on the same tokens.
        parameters: weights, tied ones once.
        tokens: tokens trained on.
        seconds: training alone.
    """

    directory: Path
    evaluation: EvalResult
    perplexity_unigram: float
    parameters: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For ``training.json`` and ``--json``."""
        return {
            "schema": "vllm-sparse/train/1",
            **asdict(self),
            "directory": str(self.directory),
            "evaluation": self.evaluation.to_json(),
        }


class LanguageModelling:
    """Next-token prediction with AdamW: the :class:`~converters.train.loop.Objective` of pre-training."""

    def __init__(
        self, model: nn.Module, recipe: OptimiserRecipe, device: torch.device, precision: Any
    ) -> None:
        self.model = model.to(device).train()
        self.recipe = recipe
        self.device = device
        self.precision = precision
        self.optimiser = adamw(model, recipe)

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """One update; figures are the batch's mean loss, the gradient norm and the learning rate."""
        lr = lr_at(index, self.recipe)
        set_lr(self.optimiser, lr)
        parts = batch.to(self.device).chunk(self.recipe.accumulation)
        loss = torch.zeros((), device=self.device)
        for ids in parts:
            with autocast(self.device, self.precision):
                logits = self.model(input_ids=ids, use_cache=False).logits
            share = next_token_loss(logits, ids) * (len(ids) / len(batch))
            share.backward()
            loss += share.detach()
        norm = parallel.clip_gradients(self.model.parameters(), self.recipe.clip_norm)
        self.before_update()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm, "lr": lr}

    def before_update(self) -> None:
        """For methods that change gradients after clipping and before AdamW sees them."""

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        return [self.optimiser]

    def state_dict(self) -> dict[str, Any]:
        """Weights and AdamW's moments."""
        return {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])


def run_directory(out: Path) -> Path:
    """Where a run keeps its log and checkpoints: beside the model, since that appears only when whole."""
    return out.absolute().with_name(out.name + ".run")


def train_model(
    recipe: TrainRecipe, out: Path, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> TrainResult:
    """Tokenizer, model, training, held-out perplexity; writes ``out`` when all is done.

    Args:
        recipe: what to train on what, how long.
        out: model directory; the log and checkpoints go to ``OUT.run`` beside it.
        resume: continue ``OUT.run``.
        overwrite: replace an existing ``out``.
        quiet: no progress display.

    Raises:
        UserError: bad input, a changed recipe on resume, or a diverged run.
    """
    if launched_rank() == 0:
        clear_leftovers(out)
    check_free(out, overwrite)
    device = parallel.join(resolve_device(recipe.run.device))
    parallel.check_batch(recipe.optimiser)
    directory = run_directory(out)
    precision = resolve_precision(recipe.run.precision, device)
    corpus = load_corpus(recipe.data.source, recipe.data.heldout_fraction, recipe.data.text_limit)
    logger.info("corpus %s", corpus.summary())
    tokenizer = _tokenizer(recipe, [d.text for d in corpus.train])
    # Documents come in an order of hashed names: as many as the steps read once are a fair sample.
    wanted = recipe.optimiser.steps * recipe.optimiser.batch_size * recipe.data.sequence_length
    stream = encode_documents(corpus.train, tokenizer, wanted)
    heldout = encode_documents(corpus.heldout, tokenizer, recipe.eval_tokens)
    batches = _batches(recipe, stream, tokenizer)
    model = build_model(recipe.model, recipe.vocab_size, tokenizer.eos_token_id, recipe.run.seed)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    parameters = sum(p.numel() for p in model.parameters())
    logger.info("%s of %.2fM weights on %s in %s", recipe.model.family, parameters / 1e6, device, precision)
    trained = copy.deepcopy(model) if parallel.size() > 1 else model
    parallel.shard(trained)
    objective = LanguageModelling(trained, recipe.optimiser, device, precision)
    settings = LoopSettings(
        recipe.optimiser.steps,
        recipe.run.log_every,
        recipe.run.checkpoint_every,
        "training",
        quiet,
        recipe.run.tensorboard,
        recipe.run.evaluate_every,
        lambda: {"heldout_perplexity": perplexity(trained, heldout, recipe.data.sequence_length).perplexity},
        recipe.run.seed,
    )
    identity = {"recipe": recipe.model_dump(mode="json"), "precision": precision}
    start_run(directory, overwrite, resume)
    done = run_loop(objective, batches, settings, directory, identity, resume)
    parallel.gather_into(model, trained)

    dtype = getattr(torch, recipe.save_dtype)
    with atomic_directory(out, overwrite) as staging:
        save_model(model, staging, dtype, tokenizer)
        saved = load_for_evaluation(staging, torch.float32, device)
        context = recipe.data.sequence_length
        result = TrainResult(
            out,
            perplexity(saved, heldout, context),
            unigram_perplexity(stream, heldout, context, recipe.vocab_size),
            parameters,
            done.tokens,
            done.seconds,
        )
        write_json(staging / SUMMARY, {**result.to_json(), "recipe": recipe.model_dump(mode="json")})
    finish_run(directory, out)
    return result


def _batches(recipe: TrainRecipe, stream: Tensor, tokenizer: "PreTrainedTokenizerBase") -> Batches:
    data, size = recipe.data, recipe.optimiser.batch_size
    if data.stream:
        return StreamedBatches(data.source, tokenizer, data.sequence_length, size, data.heldout_fraction)
    return PackedBatches(pack_sequences(stream, data.sequence_length), size, recipe.run.seed)


def _tokenizer(recipe: TrainRecipe, texts: list[str]) -> "PreTrainedTokenizerBase":
    chosen: list[str] = []
    size = 0
    for text in texts:
        if size >= recipe.tokenizer_bytes:
            break
        chosen.append(text[: recipe.tokenizer_bytes - size])
        size += len(chosen[-1])
    return train_tokenizer(chosen, recipe.vocab_size, recipe.model.max_positions)
