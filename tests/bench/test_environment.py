import sys

import pytest

from bench import environment
from bench.server_metrics import kv_cache_tokens, parse, plugin_weight_bytes, total, ttft_gap_ms

PAGE = b"""vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:prompt_tokens_total{engine="0"} 100.0
vllm:prompt_tokens_total{engine="1"} 1.5e+02
vllm:cache_config_info{block_size="16",note="a \\"b\\", c",num_gpu_blocks="200"} 1.0
vllm_sparse:weight_bytes{kind="resident"} 1000.0
vllm_sparse:weight_bytes{kind="dense_equivalent"} 2000.0"""


def test_pages_are_parsed() -> None:
    samples = parse(PAGE)
    assert total(samples, "vllm:prompt_tokens_total") == 250
    assert total(samples, "vllm:nothing") is None
    assert kv_cache_tokens(samples) == 3200
    assert plugin_weight_bytes(samples) == {"resident": 1000, "dense_equivalent": 2000}
    assert kv_cache_tokens([]) is None


def test_gap_between_client_and_server_clocks() -> None:
    assert ttft_gap_ms({"ttft_ms": {"mean": 10.0, "n": 2}}, 12.5) == 2.5
    assert ttft_gap_ms(None, 12.5) is None
    assert ttft_gap_ms({}, 12.5) is None


def test_environment_tells_versions_and_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret-one")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    facts = environment.describe()
    assert facts["settings"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "secret-one" not in str(facts)
    assert facts["packages"]["numpy"]
    assert facts["memory_bytes"] >= environment.memory_available() > 0


def test_secret_settings_are_masked() -> None:
    assert environment.masked({"HF_TOKEN": "hidden", "A": "b"}) == {"HF_TOKEN": "***", "A": "b"}
    assert environment.masked_words(["--env", "A=b"]) == ["--env", "A=b"]


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "hidden"],
        ["--api-key=hidden"],
        ["--env", "HF_TOKEN=hidden"],
        ["--env=hf_token=hidden"],
        ["--serve-args", "--dtype float32 --api-key hidden"],
        ["--serve-args=--api-key=hidden --x"],
    ],
)
def test_command_line_without_the_key(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm-sparse", "bench", "run", *words, "--seed", "1"])
    line = environment.command_line()
    assert "hidden" not in str(line)
    assert line[0] == "vllm-sparse"
    assert line[-2:] == ["--seed", "1"]
