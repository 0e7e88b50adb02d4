"""Recipes: everything a run depends on, as validated YAML. Unknown keys are refused."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from converters.train.corpus import STDLIB
from converters.train.device import Precision
from converters.train.models import ModelShape
from vllm_sparse.errors import FormatError

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
# What an average remembers from one step to the next.
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
# Text of a streamed source that is read for evaluation, calibration and the tokenizer.
STREAM_BYTES = 20_000_000
RecipeT = TypeVar("RecipeT", bound=BaseModel)


class Strict(BaseModel):
    """Base of all recipe parts: closed and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _complete_groups(cls, values: Any) -> Any:
        """A group of keys given in part keeps the rest of what *this* recipe has for it.

        A method's own defaults would otherwise give way to those of the group's class as soon as one key of
        the group is set.
        """
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        defaults = {name: fields[name].default for name in values if name in fields}
        return {
            name: {**dict(defaults[name]), **value}
            if isinstance(value, dict) and isinstance(defaults.get(name), BaseModel)
            else value
            for name, value in values.items()
        }


class DataRecipe(Strict):
    """Where text comes from; see :mod:`converters.train.corpus`."""

    source: str = STDLIB
    heldout_fraction: Fraction = 0.05
    max_bytes: int | None = Field(default=None, gt=0)
    stream: bool = Field(
        default=False, description="train on a `datasets` source row by row; max_bytes bounds only the rest"
    )
    sequence_length: int = Field(default=512, ge=8)

    @property
    def text_limit(self) -> int | None:
        """Characters of each side to hold in memory: of a stream, what evaluation and calibration need."""
        return self.max_bytes or (STREAM_BYTES if self.stream else None)


class OptimiserRecipe(Strict):
    """AdamW with linear warm-up, cosine decay and, where asked for, a linear cool-down to zero."""

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=4, ge=1, description="sequences a step")
    accumulation: int = Field(default=1, ge=1, description="parts that a batch is computed in")
    lr: float = Field(default=3e-3, gt=0)
    min_lr_ratio: float = Field(default=0.05, ge=0, le=1)
    warmup: int = Field(default=50, ge=0)
    horizon: int | None = Field(
        default=None, ge=1, description="step at which the cosine ends; `steps` without one"
    )
    cooldown: int = Field(default=0, ge=0, description="last steps, over which the rate falls to 0")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)


class RunRecipe(Strict):
    """Machine and cadence of a run."""

    # Seeds of single draws are made from it by multiplication, within 64 bits.
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = "auto"
    precision: Precision = "auto"
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=200, ge=1)
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps between held-out perplexities in the log"
    )
    gradient_checkpointing: bool = False
    tensorboard: bool = False


class TrainRecipe(Strict):
    """Train a small model from scratch."""

    model: ModelShape = ModelShape()
    vocab_size: int = Field(default=2048, ge=258)
    tokenizer_bytes: int = Field(default=4_000_000, gt=0, description="text the tokenizer learns from")
    data: DataRecipe = DataRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()
    run: RunRecipe = RunRecipe()
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eval_tokens: int = Field(default=65_536, ge=2)


# Name -> recipe. `demo` learns visibly in two to three minutes on two cores.
PRESETS: dict[str, TrainRecipe] = {
    "demo": TrainRecipe(optimiser=OptimiserRecipe(steps=200)),
    "demo-qwen3": TrainRecipe(model=ModelShape(family="qwen3"), optimiser=OptimiserRecipe(steps=200)),
    "tiny": TrainRecipe(
        model=ModelShape(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1),
        vocab_size=512,
        tokenizer_bytes=400_000,
        data=DataRecipe(max_bytes=1_500_000, sequence_length=64),
        optimiser=OptimiserRecipe(steps=60, warmup=5),
        eval_tokens=4096,
    ),
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, with nothing executed.

    Raises:
        FormatError: not a file, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise FormatError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"recipe {path} must be a mapping of keys; found {type(value).__name__}")
    return value


def validate_recipe(recipe: type[RecipeT], values: dict[str, Any]) -> RecipeT:
    """Check values against a recipe class.

    Raises:
        FormatError: every complaint in one message, each naming its key.
    """
    try:
        return recipe.model_validate(values)
    except ValidationError as error:
        raise FormatError(explain(error, recipe)) from error


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """What is wrong with each key of ``recipe``, in one paragraph."""
    return "wrong recipe: " + "; ".join(_complaint(dict(item), recipe) for item in error.errors())


def _complaint(item: dict[str, Any], recipe: type[BaseModel]) -> str:
    loc: tuple[str | int, ...] = item["loc"]
    place, kind = ".".join(str(step) for step in loc), item["type"]
    if kind == "extra_forbidden":
        return f"{place}: unknown key; {_suggestion(str(loc[-1]), _keys_at(recipe, loc[:-1]))}"
    if kind == "missing":
        return f"{place}: missing, and there is no default; give it"
    found = repr(item["input"])
    if kind == "value_error":  # a check of ours over several keys, which names them
        message = item["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    message = item["msg"]
    if kind in ("model_type", "tuple_type"):
        keys = _keys_at(recipe, loc)
        message = f"must be a group of keys: {', '.join(keys)}" if keys else "must be a list, as in [a, b]"
    return f"{place or 'recipe'}: {message} (found {found[:60]})"


def _keys_at(recipe: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Keys of the group at a place of a recipe; none where there is no group."""
    group: Any = recipe
    for step in loc:
        field = group.model_fields.get(step)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        group = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if group is None:
            return []
    return list(group.model_fields)


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}"
