"""The kernel table: its document, and that what it times are right products."""

import json

import pytest
import torch

from bench import conversion, kernels, kernels_dense
from bench.kernels_dense import baselines
from converters.cli import run
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import library

pytestmark = pytest.mark.skipif(not library.cpu_facts().built, reason="the compiled kernels are not built")

UNQUANTISED = ("dense-bf16", "dense-float32")
PUBLISHED = {
    "format",
    "backend",
    "n",
    "k",
    "m",
    "us",
    "gbs",
    "limit_fraction",
    "ratio_vs_best_dense",
    "ratio_vs_vllm_dense",
}


def test_shapes():
    assert kernels.parse_shapes("256x128, 256x128") == [(256, 128)]
    assert (28672, 4096) in kernels.parse_shapes("llama-3.1-8b")
    for wrong in ("7x128", "256x100", "llama", "x", "0x128"):
        with pytest.raises(UnsupportedError, match="shape"):
            kernels.parse_shapes(wrong)


def test_pure_reading_reads_everything():
    assert library.load_failure() is None
    data = torch.zeros(1 << 16, dtype=torch.uint8)
    assert torch.ops.vllm_sparse.read_all(data) == 0
    for position in (0, 12345, (1 << 16) - 1):
        data[position] = 1
        assert torch.ops.vllm_sparse.read_all(data) != 0
        data[position] = 0


def test_torch_is_always_a_baseline():
    assert {b.backend for b in baselines({"bf16"})} >= {"torch"}


@pytest.mark.parametrize("bf16", [False, True])
def test_float32_competes_where_bf16_has_no_instructions(monkeypatch, bf16):
    monkeypatch.setattr(kernels_dense, "has_bf16_instructions", lambda: bf16)
    names = {baseline.backend for baseline in baselines({"bf16"})}
    assert ("torch-float32" in names) == (not bf16)
    assert ("vllm-onednn-float32" in names) == (not bf16)
    rows = []
    monkeypatch.setattr(kernels, "last_level_cache", lambda: 1 << 18)
    monkeypatch.setattr(kernels, "_MIN_READ_BYTES", 1 << 20)
    kernels.run([(256, 256)], [3], ["bf16"], 3, rows.append)
    fastest = min((row for row in rows if row.format.startswith("dense-")), key=lambda row: row.us)
    assert {row.best_dense for row in rows} == {fastest.backend}


def test_the_command_writes_the_contract(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "last_level_cache", lambda: 1 << 18)
    monkeypatch.setattr(kernels, "_MIN_READ_BYTES", 1 << 20)
    out = tmp_path / "kernels.json"
    code = run(
        ["bench", "kernels", "--shapes", "256x256", "--m", "1,3", "--repeats", "3", "--json", str(out)]
    )
    assert code == 0
    report = json.loads(out.read_text())
    assert report["schema"] == "vllm-sparse/bench-kernels/1"
    assert report["threads"] == torch.get_num_threads()
    assert report["read_bandwidth_gbs"] > 0
    rows = report["rows"]
    assert all(set(row) >= PUBLISHED for row in rows)
    assert {row["format"] for row in rows} >= {*kernels.FORMATS, "dense-bf16"}
    for row in rows:
        assert 0 < row["us_min"] <= row["us"]
    for m in (1, 3):
        ratios = [r["ratio_vs_best_dense"] for r in rows if r["format"] in UNQUANTISED and r["m"] == m]
        assert max(ratios) == pytest.approx(1.0)
    assert "vs vLLM" in capsys.readouterr().out


def test_bad_arguments(capsys):
    assert run(["bench", "kernels", "--m", "0"]) == 2
    assert run(["bench", "kernels", "--formats", "int3", "--shapes", "256x256"]) == 2
    said = capsys.readouterr()
    assert "int3" in said.err
    assert not said.out  # refused before anything is timed, and before the head of the table


def test_speed_of_conversion_names_a_folder_without_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["conversion", "--source", str(tmp_path)])
    with pytest.raises(SystemExit):
        conversion.main()
    assert "holds no *.safetensors" in capsys.readouterr().err
