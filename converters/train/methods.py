"""The table of compression methods: name, recipe, what it produces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from converters.train import (
    ast_trainer,
    camera,
    cast,
    ddp,
    finetune,
    flap,
    gradual,
    hard_concrete,
    heapr,
    llm_pruner,
    magnitude,
    maskllm,
    pretrain24,
    reap,
    requant,
    shortgpt,
    sparsegpt,
    structured_ffn,
    wanda,
    wanda_sp,
)
from converters.train.context import CompressionRecipe, Context, Kind, Outcome
from converters.train.recipes import validate_recipe
from vllm_sparse.errors import FormatError, UnsupportedError


@dataclass(frozen=True)
class Method:
    """One algorithm.

    Attributes:
        recipe: its keys.
        run: changes ``context.loaded.model`` in place.
        kind: what its output is.
        summary: one line for help texts.
        parallel: runs in several processes under torchrun.
    """

    recipe: type[CompressionRecipe]
    run: Callable[[Context, Any], Outcome]
    kind: Kind
    summary: str
    parallel: bool = False

    @property
    def trains(self) -> bool:
        """Whether it takes optimiser steps, with checkpoints that a later run can continue."""
        return "optimiser" in self.recipe.model_fields


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude.MagnitudeRecipe, magnitude.run, "2:4", "largest 2 of 4, no data"),
    "wanda": Method(wanda.WandaRecipe, wanda.run, "2:4", "|W| times input norm, calibrated"),
    "sparsegpt": Method(
        sparsegpt.SparseGptRecipe, sparsegpt.run, "2:4", "second-order, corrects what is kept"
    ),
    "gradual": Method(
        gradual.GradualRecipe, gradual.run, "2:4", "gradual magnitude with distillation, trains", True
    ),
    "ast": Method(
        ast_trainer.AstRecipe, ast_trainer.run, "2:4", "annealed SR-STE with distillation, trains", True
    ),
    "cast": Method(cast.CastRecipe, cast.run, "2:4", "dense forward, decaying optimiser AdamS, trains", True),
    "maskllm": Method(
        maskllm.MaskLlmRecipe, maskllm.run, "2:4", "learned masks on frozen weights, Gumbel softmax, trains"
    ),
    "pretrain24": Method(
        pretrain24.Pretrain24Recipe,
        pretrain24.run,
        "2:4",
        "pre-training with sparse FFNs, a dense tail, trains",
    ),
    "requant": Method(
        requant.RequantRecipe, requant.run, "2:4", "int4 beside exact weights chosen by path integrals"
    ),
    "flap": Method(flap.FlapRecipe, flap.run, "structured", "fluctuation of inputs, biases make up for it"),
    "magnitude-sp": Method(
        wanda_sp.MagnitudeSpRecipe, wanda_sp.run, "structured", "KV groups and FFN channels by column norm"
    ),
    "wanda-sp": Method(
        wanda_sp.WandaSpRecipe,
        wanda_sp.run,
        "structured",
        "KV groups and FFN channels by |W| times input norm",
    ),
    "llm-pruner": Method(
        llm_pruner.LlmPrunerRecipe, llm_pruner.run, "structured", "coupled structures by |w * gradient|"
    ),
    "shortgpt": Method(
        shortgpt.ShortGptRecipe, shortgpt.run, "structured", "drops the layers of least block influence"
    ),
    "ddp": Method(
        ddp.DdpRecipe, ddp.run, "structured", "differentiable gates on frozen weights, trains", True
    ),
    "hard-concrete": Method(
        hard_concrete.HardConcreteRecipe, hard_concrete.run, "structured", "stochastic l0 gates, trains", True
    ),
    "reap": Method(reap.ReapRecipe, reap.run, "structured", "drops experts of least routed contribution"),
    "heapr": Method(heapr.HeaprRecipe, heapr.run, "structured", "channels of experts by curvature"),
    "camera-p": Method(camera.CameraRecipe, camera.run, "structured", "channels of experts by energy"),
    "finetune": Method(
        finetune.FinetuneRecipe, finetune.run, "dense", "trains on, keeping zeros and shapes", True
    ),
    "structured-ffn": Method(
        structured_ffn.StructuredFfnRecipe, structured_ffn.run, "structured", "FFN channels by magnitude"
    ),
}


def check_resume(name: str) -> None:
    """Refuse to resume a method that keeps no checkpoints.

    Raises:
        UnsupportedError: the method called ``name`` does not train.
    """
    if not METHODS[name].trains:
        training = ", ".join(key for key, method in METHODS.items() if method.trains)
        raise UnsupportedError(
            f"--resume: {name} does not train, so it keeps no checkpoint and there is nothing to continue; "
            f"methods that do are {training}. Run {name} again without --resume."
        )


def recipe_for(values: dict[str, Any]) -> CompressionRecipe:
    """Validate raw values against the recipe of the method they name.

    Raises:
        FormatError: no or unknown method, unknown keys, wrong values.
    """
    name = values.get("method")
    if not isinstance(name, str) or name not in METHODS:
        said = "no method is named" if name is None else f"method is {name!r}"
        raise FormatError(f"{said}; choose one with --method: {', '.join(METHODS)} (--list explains them)")
    return validate_recipe(METHODS[name].recipe, values)
