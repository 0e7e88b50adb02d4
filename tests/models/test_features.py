"""What people turn on around a model, on models whose layers differ."""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_checks as checks
import structured_engine as engines
import structured_reference as reference
import torch

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels import dense

pytestmark = pytest.mark.e2e


def make(
    folder: Path, family: str, layers: int, per_layer: dict[str, Any] | None = None, **extra: Any
) -> tuple[Any, ...]:
    config = checkpoints.make_config(family, layers, per_layer, **extra)
    tensors = checkpoints.make_tensors(config)
    return checkpoints.save_checkpoint(folder / family, config, tensors), config, tensors


def in_fresh_process(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check apart: n-gram drafting imports numba, after which vLLM's scan of loaded modules
    for kernels to replace fails, so no further engine could start in this process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        pool.submit(check, *arguments).result()


def check_lora(
    folder: Path,
    config: dict[str, Any],
    tensors: Any,
    adapter: Path,
    modules: list[str] | None = None,
) -> None:
    """With and without the adapter, in turn; CPU LoRA takes no prompt log-probabilities."""
    from vllm.lora.request import LoRARequest

    merged = checkpoints.save_lora(adapter, tensors, modules)
    request = LoRARequest("adapter", 1, str(adapter))
    options = {} if modules is None else {"lora_target_modules": modules}
    with engines.engine(folder, enable_lora=True, max_lora_rank=8, max_loras=1, **options) as llm:
        for prompt in engines.prompts(2):
            plain, _ = engines.decode(llm, prompt, 12)
            engines.assert_decoded(plain, prompt, config, tensors)
            adapted, _ = engines.decode(llm, prompt, 12, lora_request=request)
            engines.assert_decoded(adapted, prompt, config, merged)
            assert [token for token, _ in plain] != [token for token, _ in adapted]


def quick(family: str, *others: str) -> list[Any]:
    """One family in every run, the others among the slow tests."""
    return [family, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.mark.parametrize("family", quick("qwen3", "llama", "mistral", "qwen2", "opt"))
def test_lora(family: str, tmp_path: Path) -> None:
    check_lora(*make(tmp_path, family, 6, checkpoints.layers_for(family)), tmp_path / "adapter")


#: What adapters of models with experts can change on the CPU; a latent's expansion is folded away at load.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT_ATTENTION = ["q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek", "deepseek_v2", "deepseek_v3"])
def test_lora_on_attention(family: str, tmp_path: Path) -> None:
    """``--lora-target-modules`` keeps vLLM from its expert adapters, which it has only for GPUs."""
    modules = LATENT_ATTENTION if family in checkpoints.LATENT else ATTENTION
    made = make(tmp_path, family, 6, checkpoints.layers_for(family))
    check_lora(*made, tmp_path / "adapter", modules)


@pytest.mark.slow
def test_lora_on_experts_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    folder, _, _ = make(tmp_path, "qwen3_moe", 2, None)
    with pytest.raises(UnsupportedError, match="--lora-target-modules q_proj k_proj"):
        engine_config(folder, enable_lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2"])
def test_lora_is_refused(family: str, tmp_path: Path) -> None:
    folder, _, _ = make(tmp_path, family, 2)
    with pytest.raises(ValueError, match="does not support LoRA"), engines.engine(folder, enable_lora=True):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_ngram_speculation(family: str, tmp_path: Path) -> None:
    arguments = make(tmp_path, family, 6, checkpoints.layers_for(family))
    in_fresh_process(checks.check_ngram, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_compiled(family: str, tmp_path: Path) -> None:
    folder, config, tensors = make(tmp_path, family, 6, **checkpoints.CASES[family])
    with engines.engine(folder, enforce_eager=False) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, tensors)
        engines.assert_contract(llm, config, tensors)


@pytest.mark.slow
def test_bf16_head_of_our_own_is_as_near_as_vllms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A structured model has no quantisation config; its tied head takes the dense kernel all the same."""
    folder, config, tensors = make(tmp_path, "qwen2", 6, **checkpoints.CASES["qwen2"])
    prompt, distances = engines.prompts(1)[0], {}
    for own in (False, True):
        monkeypatch.setenv("VLLM_SPARSE_DENSE_HEAD", str(int(own)))
        with engines.engine(folder, dtype="bfloat16") as llm:
            pairs, _ = engines.decode(llm, prompt, 64)
            (head,) = llm.apply_model(head_kind)
        tokens = [token for token, _ in pairs]
        expected = reference.logprobs(tensors, config, (prompt + tokens)[:-1])[len(prompt) - 1 :]
        wanted = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        distances[head] = (torch.tensor([value for _, value in pairs]) - wanted).abs().mean().item()
    sys.stdout.write(f"\nmean |dlogprob| of 64 decoded tokens in bf16: {distances}\n")
    usable = dense.unsupported_reason(torch.zeros(8, 64, dtype=torch.bfloat16)) is None
    assert list(distances) == (["vllm", "own"] if usable else ["vllm"])
    assert distances.get("own", 0.0) <= 1.5 * distances["vllm"]


def head_kind(model: torch.nn.Module) -> str:
    """Whose product the output head takes for few tokens."""
    return "own" if hasattr(model.lm_head, "head_panels") else "vllm"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_uniform_pruned_model(family: str, tmp_path: Path) -> None:
    folder, config, tensors = make(tmp_path, family, 2, None, num_key_value_heads=2, intermediate_size=96)
    with engines.engine(folder) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts(1)), config, tensors)


@pytest.mark.parametrize(
    "layers",
    [{"0": {"skip": ["attention"]}}, {"0": {"skip": ["attention", "mlp"]}}, {"1": {"head_dim": 64}}],
    ids=["first without attention", "first empty", "head_dim differs"],
)
def test_unusual_layers(layers: dict[str, Any], tmp_path: Path) -> None:
    folder, config, tensors = make(tmp_path, "llama", 2, layers)
    with engines.engine(folder) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts(1)), config, tensors)


def test_sliding_window_with_unequal_kv_heads(tmp_path: Path) -> None:
    """The window is the model's, the heads are the layer's; prompts are longer than the window."""
    folder, config, tensors = make(tmp_path, "mistral", 6, checkpoints.GATED_LAYERS, sliding_window=24)
    with engines.engine(folder) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, tensors)


def engine_config(folder: Path, **options: Any) -> Any:
    """Only the engine's configuration: what a front-end builds before any worker starts."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sparse.models import register_models

    register_models()
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", **options
    ).create_engine_config()


#: What one layer of four query heads may not say of itself.
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"skip": ["self_attn"]}, "skip names 'self_attn'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
    ({"intermediate_size": 0}, "intermediate_size is 0; it must be at least 1"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 query heads do not divide into 2 KV heads"),
]


def test_bad_checkpoints_are_refused_before_a_worker_starts(tmp_path: Path) -> None:
    folder, config, tensors = make(tmp_path, "llama", 3, {"1": {"intermediate_size": 96}})
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(88, 128)
    checkpoints.save_checkpoint(folder, config, tensors)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.weight: the tensor is 88 x 128"):
        engine_config(folder)
    for number, (layer, says) in enumerate(CONTRADICTIONS):
        config["per_layer_config"] = {"1": layer}
        folder = checkpoints.save_checkpoint(tmp_path / str(number), config, {"unread": torch.zeros(1)})
        with pytest.raises(FormatError, match=f"layer 1: {says}"):
            engine_config(folder)
    folder, _, _ = make(tmp_path / "dim", "llama", 3, {"1": {"intermediate_size": 96}}, head_dim=16)
    with pytest.raises(UnsupportedError, match="head_dim 16 has no kernel"):
        engine_config(folder)


def test_unfit_options_are_refused_before_a_worker_starts(tmp_path: Path) -> None:
    tail = {"skip": ["attention"]}
    folder, _, _ = make(tmp_path, "llama", 4, {"1": {"intermediate_size": 99}, "2": tail, "3": tail})
    with pytest.raises(UnsupportedError, match=r"layer 1: the feed-forward width is 99.*98 or 100"):
        engine_config(folder, tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="pipeline stage 1 holds layers 2 to 3"):
        engine_config(folder, pipeline_parallel_size=2)


@pytest.mark.slow
def test_experts_over_ranks_are_refused_on_cpu(tmp_path: Path) -> None:
    folder, _, _ = make(tmp_path, "qwen3_moe", 2, None)
    with pytest.raises(UnsupportedError, match="--enable-expert-parallel: vLLM's CPU expert kernel"):
        engine_config(folder, tensor_parallel_size=2, enable_expert_parallel=True)


def test_compile_caches_tell_shapes_apart(tmp_path: Path) -> None:
    """Two models that differ in nothing but one layer's width must not share compiled code."""
    hashes = []
    for width in (96, 64):
        config = checkpoints.make_config("llama", 3, {"1": {"intermediate_size": width}})
        checkpoints.save_checkpoint(tmp_path, config, checkpoints.make_tensors(config))
        hashes.append(engine_config(tmp_path).model_config.compute_hash())
    assert hashes[0] != hashes[1]
