"""Without the CUDA C++ kernels the load report and the doctor say, once, what that costs and what to do."""

import pytest
import torch

from converters import doctor
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.base import LinearSpec, WeightFormat
from vllm_sparse.kernels.cuda import library
from vllm_sparse.kernels.cuda.library import BUILD_COMMAND, PIP_TOOLKIT
from vllm_sparse.kernels.dispatch import get_backend
from vllm_sparse.kernels.triton import backend

SPEC = LinearSpec(64, 128, WeightFormat.BF16, torch.bfloat16)


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """No library, and kernels that are not interpreted."""
    monkeypatch.setenv(library.ENV_LIBRARY, str(tmp_path / "none.so"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backend, "_cuda_kernels_would_serve", lambda: True)
    library._load.cache_clear()
    yield
    library._load.cache_clear()


def test_triton_alone_is_slow(missing, monkeypatch):
    advice = get_backend("triton").advice(SPEC)
    assert "slower than dense ones in decode batches of 3 to 64 tokens" in advice
    assert BUILD_COMMAND in advice
    assert PIP_TOOLKIT in advice
    # Scale groups that the CUDA C++ kernels do not take gain nothing by them.
    groups = LinearSpec(64, 128, WeightFormat.INT4, torch.bfloat16, group_size=32)
    assert get_backend("triton").advice(groups) is None
    assert get_backend("reference").advice(SPEC) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert get_backend("triton").advice(SPEC) is None


def test_where_they_do_not_serve_there_is_nothing_to_say(missing, monkeypatch):
    monkeypatch.setattr(backend, "_cuda_kernels_would_serve", lambda: False)
    assert get_backend("triton").advice(SPEC) is None


def test_with_the_library_there_is_nothing_to_say(missing, monkeypatch):
    monkeypatch.setattr(library, "load_failure", lambda: None)
    assert get_backend("triton").advice(SPEC) is None


def test_the_load_report_warns_once(missing, monkeypatch):
    pytest.importorskip("vllm")
    from vllm_sparse.quantization import report

    said = []
    monkeypatch.setattr(report.logger, "warning", lambda text, *values: said.append(text % values))
    made = report.LoadReport(pending=9)
    for name in ("triton", "triton", "reference"):
        made.sparse(SPEC, name, 1, ())
    assert said == [library.advice()]


def test_the_doctor_says_it_too(missing, monkeypatch, capsys):
    from converters.tables import print_diagnosis

    monkeypatch.setattr(backend, "_device_reason", lambda device: None)
    monkeypatch.setattr(dispatch, "_PREFERENCE", {doctor.this_device().type: ("triton", "reference")})
    found = doctor.diagnose()
    assert found.advice == (library.advice(),)
    assert not any("decode batches" in problem for problem in found.problems)
    assert found.as_json()["advice"] == found.advice
    print_diagnosis(found)
    assert "decode batches of 3 to 64 tokens" in " ".join(capsys.readouterr().out.split())
