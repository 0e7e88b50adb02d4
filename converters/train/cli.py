"""Command-line face of train, compress and eval."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from converters.train.threads import wait_passively

DEFAULT_CONTEXT = 512


def add_commands(app: typer.Typer) -> None:
    """Register the training commands on the root ``app``."""
    app.command("compress")(compress_command)
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
    app.command("scaling-law")(scaling_law_command)
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
    wait_passively()
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
    save: Annotated[
        bool, typer.Option("--save", help="Keep the result with the model: eval.json and the model card.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Result as JSON.")] = False,
) -> None:
    """Perplexity of a model on text, with its context length stated.

    Example: vllm-sparse eval out/model --data notes.txt --context-length 512 --json
    """
    wait_passively()
    from converters.train.evaluate import evaluate_directory
    from converters.train.output import to_json

    result = evaluate_directory(model, data, context_length, max_tokens, dtype, device)
    if save:
        from converters.card import record_evaluation

        record_evaluation(Path(model), {**result.to_json(), "data": data, "dtype": dtype})
    if json_output:
        typer.echo(to_json(result.to_json()))
    else:
        typer.echo(
            f"{model}: perplexity {result.perplexity:.4f} at context length {result.context_length} "
            f"on {result.tokens} tokens of {data} ({result.nll:.5f} nats a token)"
            + ("" if result.activations == "none" else f", activations {result.activations}")
        )


def compress_command(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; options override it.")] = None,
    method: Annotated[str | None, typer.Option(help="Algorithm; `--list` shows them.")] = None,
    model: Annotated[str | None, typer.Option(help="Model directory or hub id to compress.")] = None,
    data: Annotated[str | None, typer.Option(help="stdlib, a file, a directory or a dataset name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Model directory to write.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe key: samples=64, run.seed=1.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue OUT.run (methods that train).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, memory, time; do nothing.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the methods and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Result as JSON.")] = False,
) -> None:
    """Compress a model with one of this project's algorithms.

    Example: vllm-sparse compress --method sparsegpt --model out/model --data stdlib --out out/sparse
    """
    wait_passively()
    from converters.train.methods import METHODS, check_resume, recipe_for
    from converters.train.output import to_json
    from converters.train.recipes import read_yaml

    if list_:
        for name, entry in METHODS.items():
            typer.echo(f"{name:16} {entry.kind:10} {entry.summary}")
        return
    values = read_yaml(recipe) if recipe is not None else {}
    options = {"method": method, "model": model, "out": str(out) if out else None}
    values |= {name: value for name, value in options.items() if value is not None}
    values = _merged(values, "data", source=data)
    for assignment in set_ or ():
        values = _assigned(values, assignment)
    checked = recipe_for(values)
    if resume:
        check_resume(checked.method)
    _log_to_stderr()
    if dry_run:
        from converters.train.estimate import estimate, plan_text

        figures = estimate(checked)
        plan = {"recipe": checked.model_dump(mode="json"), "estimate": figures.to_json()}
        typer.echo(to_json(plan) if json_output else plan_text(checked, figures))
        return
    from converters.train.compress import run_recipe

    result = run_recipe(checked, overwrite, resume)
    typer.echo(to_json(result.to_json()) if json_output else result.summary())


def scaling_law_command(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of one method with different budgets.")],
    json_output: Annotated[bool, typer.Option("--json", help="Result as JSON.")] = False,
) -> None:
    """Fit excess loss = a * tokens^-b to finished runs that differ in steps alone.

    Example: python -m converters.train scaling-law out/cast-500 out/cast-1000 out/cast-2000
    """
    from converters.train.output import to_json
    from converters.train.scaling_law import fit, read_points

    law = fit(read_points(runs))
    if json_output:
        typer.echo(to_json(law.to_json()))
        return
    for point in law.points:
        typer.echo(
            f"{point.tokens:>14} tokens  excess {point.excess:.4f}  fit {law.excess(point.tokens):.4f}"
        )
    halved = law.tokens_for(law.points[-1].excess / 2)
    typer.echo(
        f"excess = {law.a:.4g} * tokens^-{law.b:.3f} ({len(law.points)} runs, residual {law.residual:.3f}); "
        f"half of the last excess is predicted at {halved:.3g} tokens"
    )


def _assigned(values: dict[str, Any], assignment: str) -> dict[str, Any]:
    """``a.b=value`` put into nested values; the value is read as YAML."""
    import yaml

    from vllm_sparse.errors import UserError

    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"--set {assignment!r}: write KEY=VALUE, for example run.seed=1")
    head, _, rest = path.partition(".")
    if rest:
        inner = values.get(head) or {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {assignment!r}: {head} is not a group of keys")
        return {**values, head: _assigned(inner, f"{rest}={text}")}
    try:
        return {**values, head: yaml.safe_load(text)}
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment!r}: {text!r} is not a YAML value") from error


def _merged(values: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    from vllm_sparse.errors import UserError

    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return values
    inner = values.get(part) or {}
    if not isinstance(inner, dict):
        raise UserError(
            f"the recipe's `{part}` is {inner!r}; it must be a group of keys, "
            f"{part}.{next(iter(given))} among them"
        )
    return {**values, part: {**inner, **given}}


def _log_to_stderr() -> None:
    from converters.launch import launched_rank

    # Of several processes the first speaks for all.
    level = logging.INFO if launched_rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
