"""The self-test of the CUDA C++ kernels: it lets right products pass and finds wrong ones."""

import pytest
import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.cuda import library, mma_sp, selftest
from vllm_sparse.kernels.triton import ops, tables
from vllm_sparse.kernels.triton.configs import CUDA_ROUTES, Config, Machine, Route, Shape

from .conftest import DEVICE, INTERPRETED

HOPPER = Machine("NVIDIA H200", (9, 0), 132, 227 << 10)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The emulated library, or the real one on a GPU; what is said of it is forgotten afterwards."""
    if INTERPRETED:
        from .emulated import EmulatedLibrary

        monkeypatch.setattr(library, "_load", lambda: (EmulatedLibrary(), None))
    elif library.load_failure() is not None:
        pytest.skip(f"{library.load_failure()}")
    monkeypatch.setattr(library, "_distrusted", [])
    for cached in (mma_sp.unsupported_reason, selftest.run_once):
        cached.cache_clear()
    yield
    for cached in (mma_sp.unsupported_reason, selftest.run_once):
        cached.cache_clear()


def machine() -> Machine:
    return HOPPER if INTERPRETED else ops.machine_of(DEVICE.index or 0)


def test_right_products_pass():
    """Also in a model loader, which sets defaults of its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert selftest.failure(DEVICE, machine()) is None
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("route", CUDA_ROUTES)
def test_a_wrong_product_is_found_and_the_library_left_alone(monkeypatch, route):
    """One output of one kernel off by a hundredth; afterwards every layer is refused the kernels."""
    right = mma_sp.launch

    def wrong(call, config, y):
        right(call, config, y)
        if config.route is route:
            y[3, 80] += 0.01 + 0.01 * y[3, 80].abs()

    monkeypatch.setattr(mma_sp, "launch", wrong)
    if not INTERPRETED and machine().capability != (9, 0) and route is not CUDA_ROUTES[0]:
        pytest.skip("that kernel is for compute capability 9.0")
    reason = selftest.failure(DEVICE, machine())
    assert f"self-test of {route.value} on {machine().name} is wrong" in reason
    library.distrust(reason)
    assert library.load_failure() == reason
    # A backend that was asked for by name does not serve it either.
    with pytest.raises(UnsupportedError, match="self-test of"):
        library.start(library.Problem(), library.Launch(), 0)


@pytest.mark.parametrize(("programs", "launched"), [(False, {0}), (True, {0, 1})])
def test_tile_after_tile_is_tested_only_if_asked(monkeypatch, programs, launched):
    if not INTERPRETED and machine().capability != (9, 0):
        pytest.skip("that kernel is for compute capability 9.0")
    seen = []
    right = mma_sp.launch

    def noted(call, config, y):
        seen.append(config)
        right(call, config, y)

    monkeypatch.setattr(mma_sp, "launch", noted)
    assert selftest.failure(DEVICE, machine(), programs) is None
    assert {config.programs for config in seen} == launched
    assert {config.route for config in seen if not config.programs} == set(CUDA_ROUTES)


@pytest.mark.parametrize("programs", [0, 132])
def test_a_table_that_names_tile_after_tile_has_it_tested(monkeypatch, tmp_path, programs):
    """No rule chooses it, so at any other load nothing of it runs."""
    path = tmp_path / "table.json"
    config = Config(Route.WGMMA_SP_TMA, 128, 128, 1, 8, 4, programs=programs)
    tables.write_table(path, HOPPER, {}, {(Shape(WeightFormat.BF16, 4096, 4096), 4096): (config, 1.0)})
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    tables.forget()
    asked = []
    monkeypatch.setattr(selftest, "failure", lambda device, machine, programs: asked.append(programs))
    try:
        selftest.run_once(0, HOPPER)
    finally:
        tables.forget()
    assert asked == [bool(programs)]


def test_nan_is_wrong():
    out = torch.full((2, 3), float("nan"))
    assert selftest._excess(out, torch.ones(2, 4), torch.ones(3, 4)) == float("inf")


def test_without_a_library_there_is_nothing_to_test(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: (None, "it is not built"))
    monkeypatch.setattr(selftest, "failure", lambda *_: pytest.fail("it was tested"))
    selftest.run_once(0, HOPPER)


def test_a_failure_is_said_once_and_kept(monkeypatch, caplog):
    monkeypatch.setattr(selftest, "failure", lambda *_: "the self-test went wrong")
    selftest.run_once(0, HOPPER)
    selftest.run_once(0, HOPPER)
    assert library.load_failure() == "the self-test went wrong"
    assert caplog.text.count("the self-test went wrong") == 1
