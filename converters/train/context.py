"""What every compression method is given, and what it gives back."""

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train import parallel
from converters.train.calibration import decoder_layers, linears_of
from converters.train.corpus import Corpus, Document, load_corpus
from converters.train.loading import LoadedModel, load_model
from converters.train.loop import LoopSettings, Objective, run_loop
from converters.train.packing import Batches, PackedBatches, encode_documents, pack_sequences, scattered
from converters.train.recipes import DataRecipe, OptimiserRecipe, RunRecipe, Strict
from converters.train.streaming import StreamedBatches
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24.mask import GROUP

# Characters of a piece of text for each token of a sequence: several sequences, so that few span two pieces.
PIECE = 16


class CompressionRecipe(Strict):
    """Keys that all methods share."""

    method: str
    model: str = Field(min_length=1, description="model directory or hub id")
    out: Path | None = None
    data: DataRecipe = DataRecipe()
    run: RunRecipe = RunRecipe()
    eval_tokens: int = Field(default=65_536, ge=0, description="held-out tokens to measure on; 0 for none")
    save_dtype: Literal["source", "bfloat16", "float16", "float32"] = "source"


class Sparse24Recipe(CompressionRecipe):
    """Keys of methods that prune linears to 2:4."""

    ignore: tuple[str, ...] = Field(default=(), description="patterns of linears to keep dense")


class CalibratedRecipe(Sparse24Recipe):
    """Keys of 2:4 methods that look at activations."""

    samples: int = Field(default=128, ge=1, description="calibration sequences of data.sequence_length")


Kind = Literal["2:4", "structured", "dense"]


@dataclass
class Outcome:
    """What a method did to the model in its context.

    Attributes:
        kind: what the weights are now.
        config: ``config.json`` to write.
        figures: method-specific numbers for the report.
    """

    kind: Kind
    config: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """A loaded model, its data and where to work.

    Attributes:
        loaded: the model to change in place, on ``device``.
        recipe: validated.
        device: where to compute.
        work: folder for logs and checkpoints of methods that train.
        resume: continue what is in ``work``.
        quiet: no progress display.
    """

    loaded: LoadedModel
    recipe: CompressionRecipe
    device: torch.device
    work: Path
    resume: bool = False
    quiet: bool = False

    @cached_property
    def corpus(self) -> Corpus:
        """Text, split."""
        data = self.recipe.data
        return load_corpus(data.source, data.heldout_fraction, data.text_limit)

    @property
    def sequence_length(self) -> int:
        """Tokens in a sequence, within what the model takes.

        Raises:
            FormatError: the recipe asks for more positions than the model has.
        """
        length = self.recipe.data.sequence_length
        limit = self.loaded.config.get("max_position_embeddings")
        if limit is not None and length > limit:
            raise FormatError(
                f"data.sequence_length {length} exceeds the model's {limit} positions; "
                f"pass --set data.sequence_length={limit} or less"
            )
        return length

    @cached_property
    def heldout(self) -> Tensor:
        """Held-out tokens ``[<= eval_tokens]``."""
        return self._encode(self.corpus.heldout, self.recipe.eval_tokens)

    def _encode(self, documents: Iterable[Document], tokens: int) -> Tensor:
        return encode_documents(documents, self.loaded.tokenizer, tokens, self.loaded.vocab_size)

    def training_batches(self, optimiser: OptimiserRecipe) -> Batches:
        """Batches of text from all over the corpus; no more is encoded than the steps read once."""
        data = self.recipe.data
        if data.stream:
            return StreamedBatches(
                data.source,
                self.loaded.tokenizer,
                self.sequence_length,
                optimiser.batch_size,
                data.heldout_fraction,
            )
        sequences = self._sample(optimiser.steps * optimiser.batch_size)
        return PackedBatches(sequences, optimiser.batch_size, self.recipe.run.seed)

    def _sample(self, count: int) -> Tensor:
        """At most ``count`` training sequences, from pieces of text drawn with the run's seed."""
        pieces = scattered(self.corpus.train, PIECE * self.sequence_length, self.recipe.run.seed)
        return pack_sequences(self._encode(pieces, count * self.sequence_length), self.sequence_length)

    def train(self, objective: Objective, optimiser: OptimiserRecipe, precision: str) -> dict[str, Any]:
        """Run an objective under the recipe's cadence; returns figures for the report."""
        run = self.recipe.run
        settings = LoopSettings(
            optimiser.steps,
            run.log_every,
            run.checkpoint_every,
            self.recipe.method,
            self.quiet,
            run.tensorboard,
            seed=run.seed,
        )
        identity = {"recipe": self.recipe.model_dump(mode="json", exclude={"out"}), "precision": precision}
        done = run_loop(
            objective, self.training_batches(optimiser), settings, self.work, identity, self.resume
        )
        return {
            "steps": done.steps,
            "training_tokens": done.tokens,
            "training_seconds": done.seconds,
            **done.last,
        }

    def collect(self, sharded: nn.Module | None, rebuild: Callable[[], None]) -> None:
        """After training in several processes: give process 0 an ordinary model with the trained tensors.

        Args:
            sharded: what was trained; None when weights were frozen. :attr:`loaded` becomes the source model,
                freshly read, with its tensors.
            rebuild: does to ``loaded.model`` what was done to it before it was sharded, so that both have the
                same tensors.

        On one process nothing happens; of several, all but the first end here.
        """
        if parallel.size() == 1:
            return
        if parallel.is_main():
            self.loaded = load_model(self.loaded.directory, torch.float32, "cpu")
            rebuild()
        if sharded is None:
            parallel.finish_other_ranks()
        else:
            parallel.gather_into(self.loaded.model, sharded)
        self.loaded.model.to(self.device)

    def calibration_sequences(self, samples: int) -> Tensor:
        """``samples`` training sequences, drawn with the run's seed.

        Raises:
            FormatError: the text is too short.
        """
        sequences = self._sample(4 * samples)
        if len(sequences) < samples:
            raise FormatError(
                f"the text gives {len(sequences)} sequences of {self.sequence_length} tokens, "
                f"calibration wants {samples}; give more text or fewer samples"
            )
        generator = torch.Generator().manual_seed(self.recipe.run.seed)
        return sequences[torch.randperm(len(sequences), generator=generator)[:samples]]

    def targets(self, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
        """Linears of the decoder layers to prune to 2:4, by full name; head and embeddings never are.

        Raises:
            FormatError: an input width is not a multiple of 4, or nothing is left, or a pattern is of nothing
                in the model, as a misspelt one is.
        """
        modules = [name for name, _ in self.loaded.model.named_modules()]
        for pattern in ignore:
            if not fnmatch.filter(modules, pattern):
                raise FormatError(
                    f"ignore has {pattern!r}, which matches no module of the model; names are like "
                    "model.layers.0.mlp.down_proj, and * stands for any part"
                )
        found: dict[str, nn.Linear] = {}
        for index, layer in enumerate(decoder_layers(self.loaded.model)):
            for name, linear in linears_of(layer).items():
                full = f"model.layers.{index}.{name}"
                if any(fnmatch.fnmatch(full, pattern) for pattern in ignore):
                    continue
                if linear.in_features % GROUP:
                    raise FormatError(
                        f"{full} has {linear.in_features} input features, not a multiple of {GROUP}; "
                        "keep it dense by adding it to ignore"
                    )
                found[full] = linear
        if not found:
            raise FormatError(f"ignore = {list(ignore)} leaves no linear to prune")
        return found
