"""Choosing a backend: preference, forcing, reasons, facts."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import dispatch, library
from vllm_sparse.kernels.base import LinearSpec, WeightFormat

CPU = torch.device("cpu")
BF16 = LinearSpec(64, 128, WeightFormat.BF16, torch.bfloat16)
FP32 = LinearSpec(64, 128, WeightFormat.FP32, torch.float32)
BUILT = library.cpu_facts().built


@pytest.fixture(autouse=True)
def _no_forcing(monkeypatch):
    monkeypatch.delenv("VLLM_SPARSE_BACKEND", raising=False)
    monkeypatch.delenv("VLLM_SPARSE_PREFILL", raising=False)


@pytest.mark.skipif(not BUILT, reason="the compiled kernels are not built")
def test_the_compiled_backend_is_preferred():
    selection = dispatch.select(BF16, CPU)
    assert selection.backend.name == "cpu"
    assert selection.rejected == ()
    assert dispatch.selections()[BF16, "cpu"] is selection


def test_reference_serves_what_others_cannot_and_says_why():
    selection = dispatch.select(FP32, CPU)
    assert selection.backend.name == "reference"
    assert [name for name, _ in selection.rejected] == ["cpu"]
    assert "float32" in selection.rejected[0][1] or not BUILT


def test_forcing(monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_BACKEND", "reference")
    selection = dispatch.select(BF16, CPU)
    assert selection.backend.name == "reference"
    assert selection.forced
    monkeypatch.setenv("VLLM_SPARSE_BACKEND", "cpu")
    with pytest.raises(UnsupportedError, match="VLLM_SPARSE_BACKEND=cpu cannot serve"):
        dispatch.select(FP32, CPU)
    monkeypatch.setenv("VLLM_SPARSE_BACKEND", "abacus")
    with pytest.raises(UnsupportedError, match="abacus"):
        dispatch.select(BF16, CPU)


def test_an_unknown_way_for_prompts_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_PREFILL", "abacus")
    with pytest.raises(
        UnsupportedError, match=r"VLLM_SPARSE_PREFILL=abacus: allowed is cusparselt\. Unset it"
    ):
        dispatch.select(BF16, CPU)


@pytest.mark.parametrize("forced", [None, "reference"])
def test_where_nothing_can_be_added_for_prompts_it_is_said(monkeypatch, forced):
    if forced is not None:
        monkeypatch.setenv("VLLM_SPARSE_BACKEND", forced)
    without = dispatch.select(BF16, CPU)
    monkeypatch.setenv("VLLM_SPARSE_PREFILL", " cuSPARSELt ")
    selection = dispatch.select(BF16, CPU)
    name = selection.backend.name
    assert selection.backend is without.backend
    assert selection.forced == (forced is not None)
    reason = "VLLM_SPARSE_PREFILL adds to the triton and cuda kernels only"
    assert selection.rejected == (*without.rejected, (f"{name}+cusparselt", reason))


def test_backends_that_have_it_get_no_more(monkeypatch):
    """By name it is there without the variable, and once with it."""
    backend = dispatch.get_backend("triton+cusparselt")
    monkeypatch.setattr(type(backend), "unsupported_reason", lambda self, spec, device: None)
    monkeypatch.setenv("VLLM_SPARSE_BACKEND", "triton+cusparselt")
    monkeypatch.setenv("VLLM_SPARSE_PREFILL", "cusparselt")
    selection = dispatch.select(BF16, CPU)
    assert selection.backend is backend
    assert selection.rejected == ()


def test_a_weight_elsewhere_is_not_for_the_cpu_backend():
    reason = dispatch.get_backend("cpu").unsupported_reason(BF16, torch.device("cuda:0"))
    assert "cuda" in reason


def _facts_in_subprocess(**env: str) -> str:
    code = "from vllm_sparse.kernels import library; print(library.cpu_facts())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.mark.skipif(not BUILT, reason="the compiled kernels are not built")
def test_the_environment_chooses_the_level():
    assert "level='scalar'" in _facts_in_subprocess(VLLM_SPARSE_ISA="scalar")
    assert "abacus" in _facts_in_subprocess(VLLM_SPARSE_ISA="abacus")


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_LIBRARY_FILE", tmp_path / "none.so")
    library._load.cache_clear()
    try:
        facts = library.cpu_facts()
        assert not facts.built
        assert "C++ compiler" in facts.reason
        selection = dispatch.select(BF16, CPU)
        assert selection.backend.name == "reference"
        assert "C++ compiler" in selection.rejected[0][1]
    finally:
        monkeypatch.undo()
        library._load.cache_clear()
