"""Run a compression method from a model directory to a new one."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from converters.launch import launched_rank
from converters.train import parallel
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.device import require_one_process, resolve_device
from converters.train.evaluate import EvalResult, perplexity
from converters.train.loading import LoadedModel, load_model
from converters.train.loop import finish_run, start_run
from converters.train.methods import METHODS, check_resume, recipe_for
from converters.train.output import atomic_directory, check_free, check_room, clear_leftovers, write_json
from converters.train.saving import round_weights, save_like
from converters.train.trainer import run_directory
from vllm_sparse.errors import FormatError, NumericsError
from vllm_sparse.sparse24 import is_24

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SUMMARY = "compression.json"


@dataclass(frozen=True)
class CompressResult:
    """A compressed model on disk.

    Attributes:
        directory: the saved model; 2:4 weights are dense with zeros, for the converter to pack.
        method: which algorithm.
        kind: ``2:4`` or ``structured``.
        parameters: weights before and after, tied ones once; zeros count.
        zero_fraction: share of exact zeros among all saved weights.
        dense: held-out perplexity of the source, None when not measured.
        compressed: that of the saved weights, same tokens and context.
        seconds: the method alone.
        cpu_seconds: the same in processor time of this process, which other work on the machine does not
            change; of a resumed run only the last part.
        figures: method-specific numbers.
    """

    directory: Path
    method: str
    kind: str
    parameters: tuple[int, int]
    zero_fraction: float
    dense: EvalResult | None
    compressed: EvalResult | None
    seconds: float
    cpu_seconds: float
    figures: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """A few words for the terminal."""
        before, after = self.parameters
        text = (
            f"{self.directory}: {self.method}, {self.kind}, "
            f"{after / 1e6:.2f}M of {before / 1e6:.2f}M weights, "
            f"{self.zero_fraction:.1%} of them zero, {self.seconds:.1f} s"
        )
        if self.dense is None or self.compressed is None:
            return text
        return (
            f"{text}; held-out perplexity {self.dense.perplexity:.2f} -> {self.compressed.perplexity:.2f} "
            f"at context {self.compressed.context_length}"
        )

    def to_json(self) -> dict[str, Any]:
        """For ``compression.json`` and ``--json``."""
        return {
            "schema": "vllm-sparse/compress/1",
            **asdict(self),
            "directory": str(self.directory),
            "dense": self.dense.to_json() if self.dense else None,
            "compressed": self.compressed.to_json() if self.compressed else None,
        }


def compress_model(
    method: str,
    model: str | Path,
    out: Path,
    data: str = "stdlib",
    *,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> CompressResult:
    """Compress a model; the Python face of ``vllm-sparse compress``.

    Args:
        method: a key of :data:`converters.train.methods.METHODS`.
        model: model directory or hub id.
        out: directory to write.
        data: text source for calibration, training and evaluation.
        overwrite: replace an existing ``out``.
        resume: continue the run in ``OUT.run``, for methods that train.
        quiet: no progress display.
        options: further recipe keys, nested ones as mappings (``samples=64``,
            ``run={"seed": 1}``, ``data_options={"sequence_length": 256}`` for keys beside ``source``).
    """
    data_options = options.pop("data_options", {})
    values = {"method": method, "model": str(model), "out": str(out), **options}
    return run_recipe(
        recipe_for({**values, "data": {"source": data, **data_options}}), overwrite, resume, quiet
    )


def run_recipe(
    recipe: CompressionRecipe, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> CompressResult:
    """Run a validated recipe.

    Raises:
        UserError: bad input, ``resume`` of a method that does not train; nothing is written then.
        NumericsError: the result is not what the method promises.
    """
    if recipe.out is None:
        raise FormatError("say where to write the result: --out DIR, or `out:` in the recipe")
    method = METHODS[recipe.method]
    if resume:
        check_resume(recipe.method)
    if not method.parallel:
        require_one_process(f"method {recipe.method}")
    if launched_rank() == 0:
        clear_leftovers(recipe.out)
    check_free(recipe.out, overwrite, Path(recipe.model))
    device = parallel.join(resolve_device(recipe.run.device))
    optimiser = getattr(recipe, "optimiser", None)
    if optimiser is not None:
        parallel.check_batch(optimiser)
        if optimiser.warmup >= optimiser.steps:
            logger.warning(
                "%s: optimiser.warmup is %d of %d steps, so the learning rate never reaches its full value; "
                "lower it to about a tenth of the steps",
                recipe.method,
                optimiser.warmup,
                optimiser.steps,
            )
    # Several processes read to the CPU; sharding moves one layer after the other.
    loaded = load_model(recipe.model, torch.float32, device if parallel.size() == 1 else "cpu")
    dtype = loaded.dtype if recipe.save_dtype == "source" else getattr(torch, recipe.save_dtype)
    context = Context(loaded, recipe, device, run_directory(recipe.out), resume, quiet)
    before = _count(loaded.model)
    if method.kind != "structured" and parallel.is_main():
        check_room(recipe.out, before * dtype.itemsize)
    dense = _measure(context) if parallel.is_main() else None
    start_run(context.work, overwrite, resume)
    started, busy = time.monotonic(), time.process_time()
    if recipe.run.gradient_checkpointing and optimiser is not None:
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    outcome = method.run(context, recipe)
    loaded = context.loaded
    loaded.model.gradient_checkpointing_disable()
    loaded.model.eval()
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - busy
    round_weights(loaded.model, dtype)
    check_outcome(context, outcome)
    compressed = _measure(context)
    result = CompressResult(
        recipe.out,
        recipe.method,
        outcome.kind,
        (before, _count(loaded.model)),
        _zero_fraction(loaded.model),
        dense,
        compressed,
        seconds,
        cpu_seconds,
        outcome.figures,
    )
    if outcome.kind == "structured" and result.parameters[0] == result.parameters[1]:
        logger.warning("%s removed no weights: every layer keeps its shape", recipe.method)
    _write(context, outcome, result, dtype, overwrite)
    finish_run(context.work, recipe.out)
    return result


def _write(
    context: Context, outcome: Outcome, result: CompressResult, dtype: torch.dtype, overwrite: bool
) -> None:
    loaded: LoadedModel = context.loaded
    with atomic_directory(result.directory, overwrite) as staging:
        save_like(loaded.model, staging, loaded.directory, outcome.config, dtype)
        report = {**result.to_json(), "recipe": context.recipe.model_dump(mode="json")}
        write_json(staging / SUMMARY, report)


def check_outcome(context: Context, outcome: Outcome) -> None:
    """Verify what a method promises before anything is saved.

    Raises:
        NumericsError: weights that are not finite, or a target that is not 2:4.
    """
    for name, parameter in context.loaded.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(
                f"{name} holds NaN or infinite values after {context.recipe.method}; not saved"
            )
    if outcome.kind == "2:4":
        for name, linear in context.targets(getattr(context.recipe, "ignore", ())).items():
            if not is_24(linear.weight.detach()):
                raise NumericsError(f"{name} is not 2:4 after {context.recipe.method}; not saved")


def _measure(context: Context) -> EvalResult | None:
    if not context.recipe.eval_tokens:
        return None
    return perplexity(context.loaded.model, context.heldout, context.sequence_length)


def _count(model: "PreTrainedModel") -> int:
    return sum(p.numel() for p in model.parameters())


def _zero_fraction(model: "PreTrainedModel") -> float:
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    return zeros / _count(model)
