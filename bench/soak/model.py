"""The model a soak serves when none is named: trained for seconds, pruned to 2:4, converted."""

import shutil
from pathlib import Path

from converters.convert import convert
from converters.train.compress import compress_model
from converters.train.recipes import PRESETS
from converters.train.trainer import train_model

PRESET = "tiny"


def small_24_model(folder: Path) -> Path:
    """A ``sparse-24-bitmask`` checkpoint with tokenizer in ``folder/2of4``; a finished one is kept.

    ``folder/pruned`` is its dense twin: the same weights, stored with their zeros.
    """
    served, dense, pruned = folder / "2of4", folder / "dense", folder / "pruned"
    if (served / "config.json").is_file():
        return served
    recipe = PRESETS[PRESET]
    train_model(recipe, dense, overwrite=True)
    compress_model(
        "magnitude", dense, pruned, recipe.data.source, overwrite=True, eval_tokens=recipe.eval_tokens
    )
    shutil.rmtree(served, ignore_errors=True)
    convert(pruned, served)
    return served
