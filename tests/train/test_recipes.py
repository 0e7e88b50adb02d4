"""Recipes: what a key that is set leaves as it was, and what is said about a wrong one."""

from typing import Any

import pytest

from converters.train.methods import METHODS, recipe_for
from vllm_sparse.errors import FormatError

GROUPS = [
    (method, group)
    for method, entry in METHODS.items()
    for group in ("optimiser", "distillation")
    if group in entry.recipe.model_fields
]


@pytest.mark.parametrize(("method", "group"), GROUPS)
def test_a_key_of_a_group_leaves_the_methods_own_defaults(method: str, group: str):
    default = getattr(recipe_for({"method": method, "model": "m"}), group)
    for key, value in default.model_dump().items():
        changed = getattr(recipe_for({"method": method, "model": "m", group: {key: value}}), group)
        assert changed == default, key


def test_one_key_changes_and_the_rest_stays():
    recipe: Any = recipe_for({"method": "ddp", "model": "m", "optimiser": {"steps": 2000}})
    assert (recipe.optimiser.steps, recipe.optimiser.lr, recipe.optimiser.weight_decay) == (2000, 2e-2, 0.0)
    recipe = recipe_for({"method": "ast", "model": "m", "distillation": {"kl_weight": 0.5}})
    assert recipe.distillation.temperature == 2.0


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("ast", {"optimizer": {"steps": 1}}, r"optimizer: unknown key; did you mean optimiser\?$"),
        ("ast", {"data": {"sequence_lenght": 8}}, r"did you mean sequence_length\?$"),
        ("ast", {"slorb": {"rank": 8}}, r"slorb\.rank: unknown key; known keys are block, init, train_proj"),
        ("ast", {"data": "notes.txt"}, r"data: must be a group of keys: source, .* \(found 'notes\.txt'\)$"),
        ("wanda", {"ignore": "*.mlp.*"}, r"ignore: must be a list, as in \[a, b\] \(found '\*\.mlp"),
        ("wanda", {"model": None}, r"model: Input should be a valid string"),
        ("ast", {"save_dtype": "int8"}, r"save_dtype: Input should be 'source', 'bfloat16', 'float16' or"),
        ("ast", {"optimiser": {"betas": [0.9, 1.5]}}, r"optimiser\.betas\.1: Input should be less than 1"),
        ("ddp", {"multiplier_betas": [1, 0.9]}, r"multiplier_betas\.0: Input should be less than 1"),
        ("maskllm", {"temperature": [4, 0]}, r"temperature\.1: Input should be greater than 0"),
        ("cast", {"optimiser": {"weight_decay": 0.1}}, r"^wrong recipe: optimiser\.weight_decay is 0\.1"),
        ("pretrain24", {"optimiser": {"steps": 4}}, r"^wrong recipe: search_steps 60 exceeds .*masked_decay"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(method: str, values: dict[str, Any], message: str):
    with pytest.raises(FormatError, match=message):
        recipe_for({"method": method, "model": "m", **values})


def test_a_key_that_is_missing_is_named():
    with pytest.raises(FormatError, match=r"^wrong recipe: model: missing"):
        recipe_for({"method": "magnitude"})
