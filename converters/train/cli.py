"""Command-line face of train, compress and eval."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_CONTEXT = 512


def add_commands(app: typer.Typer) -> None:
    """Register the training commands on the root ``app``."""
    app.command("eval")(eval_command)


def main(argv: Sequence[str]) -> int:
    """``python -m converters.train``: the same commands and ``train``."""
    from converters.cli import run_app

    app = typer.Typer(
        name="python -m converters.train",
        help="Train small models, compress models, measure perplexity.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("train")(train_command)
    add_commands(app)
    return run_app(app, argv)


def train_command(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; without one, the preset's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Model directory to write.")] = None,
    preset: Annotated[str, typer.Option(help="demo, demo-qwen3 or tiny.")] = "demo",
    data: Annotated[str | None, typer.Option(help="stdlib, a file, a directory or a dataset name.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue OUT.run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Result as JSON.")] = False,
) -> None:
    """Train a small Llama or Qwen3 from scratch on real text.

    Example: python -m converters.train train --preset demo --out out/model
    """
    from converters.train.output import to_json
    from converters.train.recipes import PRESETS, TrainRecipe, read_yaml, validate_recipe
    from converters.train.trainer import train_model
    from vllm_sparse.errors import UserError

    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    values = read_yaml(recipe) if recipe is not None else PRESETS[preset].model_dump(mode="json")
    values = _merged(values, "data", source=data)
    values = _merged(values, "optimiser", steps=steps)
    values = _merged(values, "run", seed=seed)
    checked = validate_recipe(TrainRecipe, values)
    if dry_run:
        typer.echo(to_json(checked.model_dump(mode="json")))
        return
    if out is None:
        raise UserError("say where to write the model: --out DIR")
    _log_to_stderr()
    result = train_model(checked, out, resume, overwrite)
    if json_output:
        typer.echo(to_json(result.to_json()))
        return
    evaluation = result.evaluation
    typer.echo(
        f"{out}: {result.parameters / 1e6:.2f}M parameters, {result.tokens / 1e6:.2f}M tokens in "
        f"{result.seconds:.0f} s; held-out perplexity {evaluation.perplexity:.2f} at context "
        f"{evaluation.context_length} on {evaluation.tokens} tokens (unigram {result.perplexity_unigram:.1f})"
    )


def eval_command(
    model: Annotated[
        str, typer.Argument(help="Model directory (dense, structured or packed 2:4) or hub id.")
    ],
    data: Annotated[
        str, typer.Option(help="Text file, directory, dataset name, or stdlib (its held-out part).")
    ] = "stdlib",
    context_length: Annotated[int, typer.Option(help="Window in tokens.", min=2)] = DEFAULT_CONTEXT,
    max_tokens: Annotated[int | None, typer.Option(help="Evaluate only the first tokens.", min=2)] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 arithmetic.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Result as JSON.")] = False,
) -> None:
    """Perplexity of a model on text, with its context length stated.

    Example: vllm-sparse eval out/model --data notes.txt --context-length 512 --json
    """
    from converters.train.evaluate import evaluate_directory
    from converters.train.output import to_json

    result = evaluate_directory(model, data, context_length, max_tokens, dtype, device)
    if json_output:
        typer.echo(to_json(result.to_json()))
    else:
        typer.echo(
            f"{model}: perplexity {result.perplexity:.4f} at context length {result.context_length} "
            f"on {result.tokens} tokens of {data} ({result.nll:.5f} nats a token)"
        )


def _merged(values: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    given = {name: value for name, value in changes.items() if value is not None}
    return values if not given else {**values, part: {**(values.get(part) or {}), **given}}


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
