"""Zero-padding inside a layer: exact in float64, and served by vLLM as the masked original."""

from pathlib import Path

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines
import torch
from structured_reference import attend, gated_mlp

from vllm_sparse.errors import FormatError
from vllm_sparse.models.padding import (
    keep_kv_rows,
    pad_expert,
    pad_output_columns,
    pad_query_rows,
    plan_query_heads,
)

DIM = checkpoints.HEAD_DIM


def test_plan_fills_each_group_at_its_end() -> None:
    plan = plan_query_heads([3, 1, 0, 2])
    assert plan.group_size == 3
    assert plan.kv_heads == (0, 1, 3)
    assert plan.slots == (0, 1, 2, 3, -1, -1, 4, 5, -1)
    assert (plan.num_heads, plan.num_kv_heads, plan.padded_heads) == (9, 3, 3)


def test_equal_groups_stay_as_they_are() -> None:
    plan = plan_query_heads([2, 2])
    weight = torch.randn(4 * DIM, 8)
    assert plan.padded_heads == 0
    assert torch.equal(pad_query_rows(weight, plan, DIM), weight)
    assert torch.equal(pad_output_columns(weight.T, plan, DIM), weight.T)
    assert torch.equal(keep_kv_rows(weight[: 2 * DIM], plan, DIM), weight[: 2 * DIM])


@pytest.mark.parametrize("counts", [[], [0, 0], [2, -1]])
def test_impossible_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(FormatError, match="query heads per KV head"):
        plan_query_heads(counts)


def test_tensors_that_disagree_are_refused() -> None:
    with pytest.raises(FormatError, match=r"query projection holds 5 heads.*kept 4"):
        pad_query_rows(torch.zeros(5 * DIM, 8), plan_query_heads([3, 1]), DIM)
    with pytest.raises(FormatError, match="8 gate rows, 8 up rows and 7 down columns"):
        pad_expert(torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(4, 7), 16)
    with pytest.raises(FormatError, match="at most the layer's width 4"):
        pad_expert(torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(4, 8), 4)


def test_padded_attention_is_the_uneven_attention() -> None:
    torch.manual_seed(0)
    counts, hidden, tokens = [3, 1, 0, 2], 64, 17
    owner = [group for group, count in enumerate(counts) for _ in range(count)]
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    wq, wo = (
        torch.randn(6 * DIM, hidden, dtype=torch.float64),
        torch.randn(hidden, 6 * DIM, dtype=torch.float64),
    )
    bias = torch.randn(6 * DIM, dtype=torch.float64)
    wk, wv = (torch.randn(4 * DIM, hidden, dtype=torch.float64) for _ in range(2))

    q, k, v = ((x @ w.T).unflatten(1, (-1, DIM)) for w in (wq, wk, wv))
    q = q + bias.view(-1, DIM)
    uneven = torch.cat([attend(q[:, [h]], k[:, [g]], v[:, [g]]) for h, g in enumerate(owner)], 1) @ wo.T

    plan = plan_query_heads(counts)
    q, k, v = (
        (x @ w.T).unflatten(1, (-1, DIM))
        for w in (pad_query_rows(wq, plan, DIM), keep_kv_rows(wk, plan, DIM), keep_kv_rows(wv, plan, DIM))
    )
    q = q + pad_query_rows(bias, plan, DIM).view(-1, DIM)
    padded = attend(q, k, v) @ pad_output_columns(wo, plan, DIM).T
    torch.testing.assert_close(padded, uneven, rtol=0, atol=1e-12)


def test_padded_expert_is_the_expert() -> None:
    torch.manual_seed(0)
    gate, up, down = (torch.randn(*s, dtype=torch.float64) for s in ((24, 16), (24, 16), (16, 24)))
    x = torch.randn(5, 16, dtype=torch.float64)
    own = gated_mlp({"g.weight": gate, "u.weight": up, "d.weight": down}, ("g", "u", "d"), x)
    gate, up, down = pad_expert(gate, up, down, 32)
    assert gate.shape == (32, 16)
    assert down.shape == (16, 32)
    wide = gated_mlp({"g.weight": gate, "u.weight": up, "d.weight": down}, ("g", "u", "d"), x)
    torch.testing.assert_close(wide, own, rtol=0, atol=1e-12)


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_uneven_query_heads_serve_as_the_masked_model(family: str, tmp_path: Path) -> None:
    """Eight query heads over four KV heads, of which pruning left 2, 1, 0 and 2 in one layer."""
    masked_config = checkpoints.make_config(family, 2, num_attention_heads=8)
    masked = checkpoints.make_tensors(masked_config)
    counts, kept = [2, 1, 0, 2], [0, 1, 3, 6, 7]
    plan = plan_query_heads(counts)
    pruned = dict(masked)
    name = "model.layers.1.self_attn"
    for part in ("weight", "bias"):
        if f"{name}.q_proj.{part}" in masked:
            heads = masked[f"{name}.q_proj.{part}"].unflatten(0, (-1, DIM))[kept].flatten(0, 1)
            pruned[f"{name}.q_proj.{part}"] = pad_query_rows(heads, plan, DIM)
            for kv in ("k_proj", "v_proj"):
                pruned[f"{name}.{kv}.{part}"] = keep_kv_rows(masked[f"{name}.{kv}.{part}"], plan, DIM)
    columns = masked[f"{name}.o_proj.weight"].unflatten(1, (-1, DIM))
    pruned[f"{name}.o_proj.weight"] = pad_output_columns(columns[:, kept].flatten(1), plan, DIM)
    removed = [head for head in range(8) if head not in kept]
    masked[f"{name}.o_proj.weight"] = columns.index_fill(1, torch.tensor(removed), 0).flatten(1)

    layer = {"num_attention_heads": plan.num_heads, "num_key_value_heads": plan.num_kv_heads}
    config = checkpoints.make_config(family, 2, {"1": layer}, num_attention_heads=8)
    folder = checkpoints.save_checkpoint(tmp_path, config, pruned)
    with engines.engine(folder) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), masked_config, masked)
        token_bytes = (4 + plan.num_kv_heads) * DIM * 2 * 4
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == engines.KV_BYTES // (
            32 * token_bytes
        )


@pytest.mark.e2e
def test_experts_of_unequal_width_serve_as_they_were(tmp_path: Path) -> None:
    """The reference computes each expert at its own width; the served layer has one width for all."""
    config = checkpoints.make_config("qwen3_moe", 2, num_experts=4, moe_intermediate_size=64)
    own = checkpoints.make_tensors(config)
    padded = dict(own)
    for expert, width in enumerate((64, 40, 7, 24)):
        block = f"model.layers.1.mlp.experts.{expert}"
        gate, up, down = (f"{block}.{part}_proj.weight" for part in ("gate", "up", "down"))
        own[gate], own[up], own[down] = own[gate][:width], own[up][:width], own[down][:, :width]
        padded[gate], padded[up], padded[down] = pad_expert(own[gate], own[up], own[down], 64)
    folder = checkpoints.save_checkpoint(tmp_path, config, padded)
    with engines.engine(folder) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, own)
