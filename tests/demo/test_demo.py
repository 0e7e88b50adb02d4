"""The demo's own pieces: twins, the real-size model's weights, report and page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench.demo import page, real_size, report
from bench.demo.measure import Measured
from bench.demo.models import DemoModel, pad_ffn
from bench.parity import Parity
from vllm_sparse.sparse24 import group_nonzeros

LATENCY = {"p50": 1.0}
METRICS: dict[str, Any] = {
    **dict.fromkeys(("ttft_ms", "tpot_ms", "e2e_ms"), LATENCY),
    **dict.fromkeys(("output_tokens_per_s", "total_tokens_per_s", "requests_per_s"), 9.0),
}


def measured(kind: str, distance: float | None, served: float = 10.0) -> Measured:
    parity = None if distance is None else Parity(distance, 1.0, 5000, distance, distance)
    model = DemoModel(kind, kind, Path("m"), None, 10.0, "made somehow")
    return Measured(model, served, parity, METRICS, 1000)


def test_random_weights_are_exactly_24() -> None:
    weight = real_size.random_24(64, 256, torch.Generator().manual_seed(1))
    assert weight.dtype == torch.bfloat16
    assert bool((group_nonzeros(weight) == 2).all())
    kept = (weight.float().reshape(-1, 4) != 0).float().mean(0)
    assert (kept - 0.5).abs().max() < 0.03  # all columns are kept alike


def test_padding_gives_back_the_unpruned_shape(tmp_path: Path) -> None:
    dense, pruned, twin = tmp_path / "d", tmp_path / "p", tmp_path / "t"
    dense.mkdir()
    pruned.mkdir()
    (dense / "config.json").write_text(json.dumps({"intermediate_size": 8}))
    names = {
        "mlp.gate_proj": (5, 4),
        "mlp.up_proj": (5, 4),
        "mlp.down_proj": (4, 5),
        "self_attn.q_proj": (4, 4),
    }
    tensors = {f"l.{name}.weight": torch.randn(shape) for name, shape in names.items()}
    save_file(tensors, pruned / "model.safetensors")
    pad_ffn(pruned, dense, twin)
    padded = load_file(twin / "model.safetensors")
    assert padded["l.mlp.gate_proj.weight"].shape == (8, 4)
    assert padded["l.mlp.down_proj.weight"].shape == (4, 8)
    assert torch.equal(padded["l.self_attn.q_proj.weight"], tensors["l.self_attn.q_proj.weight"])
    x = torch.randn(3, 4)

    def ffn(state: dict[str, torch.Tensor]) -> torch.Tensor:
        gate, up, down = (state[f"l.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    torch.testing.assert_close(ffn(padded), ffn(tensors))


@pytest.mark.parametrize(
    ("distance", "served", "ok"), [(1e-5, 10.0, True), (1e-3, 10.0, False), (1e-5, 10.2, False)]
)
def test_a_wrong_answer_fails_the_report(distance: float, served: float, ok: bool) -> None:
    built = report.build([measured("dense", None), measured("2:4", distance, served)], 50.0, None, None)
    assert built["ok"] is ok
    assert built["models"][1]["parity"]["ok"] is ok
    assert built["schema"] == "vllm-sparse/demo/1"


def test_table_and_page_show_quality_and_speed_together(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": i, "loss": 5.0 - i}) for i in range(3)))
    ratio = {"value": 1.5, "ci95": [1.4, 1.6], "statistic": "p50", "pairs": 3}
    entry: dict[str, Any] = {
        "name": "decode-1",
        "title": "decode-bound, batch 1",
        "headline": "tpot_ms",
        "dense": METRICS,
        "compressed": METRICS,
        "ratio": {"tpot_ms": ratio},
        "repeats": 3,
        "samples": {side: {"ttft_ms": [1.0], "e2e_ms": [2.0]} for side in ("dense", "compressed")},
        "candidate": "2of4",
        "baseline": "dense",
        "failed": 0,
    }
    models = [
        {"name": "dense", "role": "dense", "checkpoint_bytes": 10},
        {"name": "2of4", "role": "compressed", "checkpoint_bytes": 6},
    ]
    speed = {"scenarios": [entry], "models": models, "config": {}}
    built = report.build([measured("dense", None), measured("2:4", 1e-6)], 50.0, speed, log)
    console = Console(record=True, width=110)
    report.print_tables(built, console)
    text, html = console.export_text(), page.render(built)
    for shown in ("2:4", "1.50x", "1.40 – 1.60", "perplexity 50.00"):
        assert shown in text
    for shown in ("1.50×", "Training", "parity ok", "real size"):
        assert shown in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_the_faster_dense_server_is_the_one_to_beat() -> None:
    def entry(scenario: str, baseline: str, candidate: str, dense: float | None) -> dict[str, Any]:
        ratio = {} if dense is None else {"tpot_ms": {"value": dense / 2, "ci95": [1.0, 9.0], "pairs": 3}}
        # The first server has the better throughput everywhere.
        rate = 9.0 if baseline == "a" else 5.0
        dense_metrics = {**METRICS, "tpot_ms": {"p50": dense}, "output_tokens_per_s": rate}
        names = {"name": scenario, "title": scenario, "headline": "tpot_ms", "failed": 0}
        sides = {"baseline": baseline, "candidate": candidate, "dense": dense_metrics}
        return {**names, **sides, "compressed": {**METRICS, "tpot_ms": {"p50": 2.0}}, "ratio": ratio}

    roles = {"a": "dense", "b": "baseline", "2of4": "compressed"}
    pairs = [("a", "2of4"), ("b", "2of4"), ("a", "b")]
    latencies = {
        "one user": {"a": 3.0, "b": 5.0},
        "eight": {"a": 8.0, "b": 4.0},
        "died": {"a": None, "b": 9.0},
    }
    speed = {
        "scenarios": [entry(s, x, y, dense[x]) for x, y in pairs for s, dense in latencies.items()],
        "models": [{"name": name, "role": role} for name, role in roles.items()],
        "config": {},
    }
    built = report.build([measured("dense", None)], None, speed, None)
    assert [(e["name"], e["baseline"]) for e in built["speed"]] == [
        ("one user", "a"),
        ("eight", "b"),
        ("died", "b"),
    ]
    assert len(built["speed_model"]["scenarios"]) == 9
    console = Console(record=True, width=110)
    report.print_tables(built, console)
    shown = console.export_text()
    assert "3.0 bf16" in shown
    assert "4.0 float32" in shown
    assert "8.0 bf16" not in shown
    assert "5.0 float32" not in shown
    assert shown.count("9.0 bf16") == 3
    assert built["speed"][1]["best_dense"]["output_tokens_per_s"] == "a"
