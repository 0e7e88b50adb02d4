"""The GPU kernel table's arithmetic, with a clock that is told the times."""

import json
import re
import shlex
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bench import (
    cuda_timing,
    decode_glue,
    decode_stack,
    gpu_session,
    kernels,
    kernels_cli,
    kernels_cuda,
    kernels_tune,
    processes,
)
from bench.cuda_dense import baselines
from bench.cuda_timing import Timing, copies_needed
from bench.kernels_cuda import FORMATS, make_spec, measure, random_weight
from vllm_sparse import sparse24
from vllm_sparse.errors import NumericsError, UnsupportedError, UserError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.kernels.cuda import library, mma_sp, selftest
from vllm_sparse.kernels.reference import ReferenceBackend, check_canonical
from vllm_sparse.kernels.triton import tables
from vllm_sparse.kernels.triton.configs import Config, Machine, Route, Shape, default_config

CPU = torch.device("cpu")
H200 = Machine("NVIDIA H200", (9, 0), 132, 227 << 10)


def told(times):
    """A timer that runs each competitor once and returns the times it was told."""

    def timer(calls):
        for competitor in calls.values():
            competitor[0]()
        return {name: Timing(times.get(name, 9.0), times.get(name, 9.0) * 0.9) for name in calls}

    return timer


def test_ratios_bandwidth_and_missing_backends():
    spec = make_spec("bf16", 64, 128)
    timer = told({"reference": 2.0, "cublas 16-bit": 3.0})
    rows = measure("bf16", spec, 4, CPU, 100.0, 1024, ("reference", "triton"), timer)
    by_name = {row.backend: row for row in rows}
    ours = by_name["reference"]
    assert ours.us == 2.0
    assert ours.gbs == pytest.approx(64 * 128 * 9 / 8 / 2.0 / 1e3)
    assert ours.limit_fraction == pytest.approx(ours.gbs / 100)
    assert ours.ratio_vs_best_dense == ours.ratio_vs_vllm_dense == 1.5
    assert by_name["cublas 16-bit"].ratio_vs_best_dense == 1.0
    assert by_name["triton"].us is None
    assert "weight is on the CPU" in by_name["triton"].note


def test_a_dense_kernel_that_is_not_here_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    rows = measure(
        "int4-g128",
        make_spec("int4-g128", 64, 256),
        1,
        CPU,
        100.0,
        1024,
        ("reference",),
        told({"reference": 1.0, "cublas 16-bit": 4.0}),
    )
    by_name = {row.backend: row for row in rows}
    assert by_name["vllm marlin int4"].us is None
    assert by_name["vllm marlin int4"].note
    assert by_name["reference"].ratio_vs_best_dense == 4.0
    assert by_name["reference"].ratio_vs_vllm_dense is None


@pytest.mark.parametrize("ordered", [False, True], ids=["0.32", "0.26"])
def test_marlin_is_called_as_the_installed_vllm_wants(monkeypatch, ordered):
    """Older ones want the order of the input columns too."""
    seen = []

    def product(a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, workspace, b_q_type,
                size_m, size_n, size_k, use_fp32_reduce=False):  # fmt: skip
        seen.append((a.shape, b_q_weight.shape, b_scales.shape, workspace, size_m, size_n, size_k))

    def older(a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, g_idx, perm, workspace,
              b_q_type, size_m, size_n, size_k, is_k_full=True, use_fp32_reduce=False):  # fmt: skip
        assert g_idx is None
        assert perm is None
        product(a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, workspace, b_q_type,
                size_m, size_n, size_k, use_fp32_reduce)  # fmt: skip

    utils = "vllm.model_executor.layers.quantization.utils"
    operators = SimpleNamespace(marlin_gemm=older if ordered else product)
    parents = ("vllm", "vllm.model_executor", "vllm.model_executor.layers", utils.rpartition(".")[0], utils)
    for name, module in {
        **{name: SimpleNamespace() for name in parents},
        "vllm": SimpleNamespace(_custom_ops=operators),
        "vllm._custom_ops": operators,
        f"{utils}.marlin_utils": SimpleNamespace(marlin_make_workspace_new=lambda device: "workspace"),
        "vllm.scalar_type": SimpleNamespace(scalar_types=SimpleNamespace(uint4b8=8)),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    marlin = next(item for item in baselines(make_spec("int4-g128", 64, 256)) if "marlin" in item.name)
    marlin.make(CPU, 3)()
    assert seen == [((3, 256), (16, 128), (2, 64), "workspace", 3, 64, 256)]


@pytest.mark.parametrize("name", list(FORMATS))
def test_random_weights_are_well_formed(name):
    spec = make_spec(name, 32, 256)
    weight = random_weight(spec, CPU)
    check_canonical(spec, weight)
    if spec.weight is WeightFormat.BF16:
        assert sparse24.is_24(sparse24.decompress(weight.values, weight.bitmask))


def test_unknown_formats_are_refused():
    with pytest.raises(UnsupportedError, match="int4-g128"):
        make_spec("int3", 8, 8)


def test_operands_overflow_the_cache():
    assert copies_needed(10 << 20, 50 << 20) == 20
    assert copies_needed(1 << 30, 50 << 20) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels_cuda.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_bench_kernels_measures_the_gpu_where_there_is_one(monkeypatch, tmp_path):
    pytest.importorskip("orjson")
    asked = {}

    def table(shapes, tokens, formats, progress):
        asked.update(shapes=shapes, tokens=tokens, formats=formats)
        progress("a line")
        return {"schema": kernels_cuda.SCHEMA, "rows": []}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels_cuda, "table", table)
    out = tmp_path / "t.json"
    kernels_cli.kernels_command(
        shapes="64x128", m="1,8", formats="bf16", repeats=3, threads=None, quick=False, json=out
    )
    assert asked == {"shapes": [(64, 128)], "tokens": [1, 8], "formats": ["bf16"]}
    assert json.loads(out.read_text())["schema"] == "vllm-sparse/bench-kernels/1"


def test_the_file_of_results_can_be_written_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    measured = []

    def table(*arguments):
        measured.append(arguments)
        return {"schema": kernels_cuda.SCHEMA, "rows": []}

    monkeypatch.setattr(kernels_cuda, "table", table)
    assert kernels_cuda.main(["--json", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert decode_stack.main(["--json", str(tmp_path)]) == 2
    assert not measured
    out = tmp_path / "new" / "folder" / "t.json"
    assert kernels_cuda.main(["--json", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == []
    assert kernels_cuda.main(["--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "4096"], "'4096' is not NxK"),
        (["--shapes", "64x100"], "K a multiple of 8"),
        (["--shapes", "0x64"], "'0x64' is not NxK"),
        (["--tokens", "0"], "'0' is not a number of at least 1"),
        (["--tokens", "1", "-3"], "'-3' is not a number of at least 1"),
    ],
)
def test_impossible_sizes_are_refused_by_a_sentence(capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        kernels_cuda.main(words)
    assert said in capsys.readouterr().err


def test_sizes_arrive_as_numbers(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(kernels_cuda, "table", lambda *arguments: asked.append(arguments[:2]) or {"rows": []})
    json_path = str(tmp_path / "t.json")
    assert kernels_cuda.main(["--shapes", "64x128", "32x64", "--tokens", "8", "--json", json_path]) == 0
    assert kernels_cuda.main(["--json", json_path]) == 0
    assert asked[0] == ([(64, 128), (32, 64)], [8])
    assert asked[1] == (list(kernels_cuda.DEFAULT_SHAPES), list(kernels_cuda.DEFAULT_TOKENS))


def test_the_help_of_bench_kernels_names_every_format_of_either_machine():
    hints = typing.get_type_hints(kernels_cli.kernels_command, include_extras=True)
    named = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", typing.get_args(hints["formats"])[1].help))
    assert set(kernels.FORMATS) | set(FORMATS) <= named


def test_the_copy_bandwidth_is_that_of_the_faster_way(monkeypatch):
    monkeypatch.setattr(cuda_timing, "_BANDWIDTH_BYTES", 4000)
    ways = {"copy": 4.0, "kernel": 2.0}
    monkeypatch.setattr(cuda_timing, "time_together", lambda calls, replays: told(ways)(calls))
    assert cuda_timing.copy_bandwidth(CPU) == pytest.approx(4.0)
    ways["kernel"] = 8.0
    assert cuda_timing.copy_bandwidth(CPU) == pytest.approx(2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_are_plausible():
    device = torch.device("cuda")
    bandwidth = cuda_timing.copy_bandwidth(device)
    assert 50 < bandwidth < 20_000
    rows = measure(
        "bf16", make_spec("bf16", 4096, 4096), 1, device, bandwidth, cuda_timing.cache_bytes(device)
    )
    assert all(0 < row.limit_fraction < 1.2 for row in rows if row.us is not None)


SMALL_STACK = decode_stack.StackShape(2, 64, 96, 4, 2, 16, 24)
PLAIN_GLUE = decode_glue.make_glue(compiled=False)


def test_rotation_and_storing_are_what_they_say():
    """One pair of a head at a time, against complex numbers; the rest of the cache is left alone."""
    inputs = decode_stack.Inputs(SMALL_STACK, 3, CPU)
    keys, values = inputs.keys.clone(), inputs.values.clone()
    qkv = torch.randn(3, 8 * 16, dtype=torch.bfloat16)
    query = PLAIN_GLUE.rotate_and_store(qkv, *inputs.slots, *inputs.angles)
    heads = qkv.float().reshape(3, 8, 2, 8)
    turn = torch.polar(torch.ones(8), 23 * 500000.0 ** -(torch.arange(8) / 8))
    turned = torch.complex(heads[:, :, 0], heads[:, :, 1]) * turn
    turned = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(query.float(), turned[:, :4], atol=0.02, rtol=0.01)
    torch.testing.assert_close(inputs.keys[:, :, -1].float(), turned[:, 4:6], atol=0.02, rtol=0.01)
    assert torch.equal(inputs.values[:, :, -1], qkv.reshape(3, 8, 16)[:, 6:])
    assert torch.equal(inputs.keys[:, :, :-1], keys[:, :, :-1])
    assert torch.equal(inputs.values[:, :, :-1], values[:, :, :-1])


def test_attention_is_by_the_fastest_way_that_runs_and_is_right():
    inputs = decode_stack.Inputs(SMALL_STACK, 3, CPU)
    operands = (inputs.query, inputs.keys, inputs.values)

    def absent(*tensors):
        raise RuntimeError("no such kernel")

    ways = {**PLAIN_GLUE.attentions, "absent": absent, "wrong": lambda q, k, v: q.flatten(1)}
    told_times = {"absent": 1.0, "wrong": 1.0, "matmul": 2.0, "plain": 3.0}
    chosen, times = decode_glue.fastest_attention(ways, *operands, told(told_times))
    assert chosen == "matmul"
    assert {"plain", "matmul", "flex"} <= set(times)
    assert not {"absent", "wrong"} & set(times)


@pytest.mark.slow
def test_compiled_glue_agrees_with_plain():
    compiled = decode_glue.make_glue()
    one, other = (decode_stack.Inputs(SMALL_STACK, 3, CPU) for _ in range(2))
    qkv = torch.randn(3, 8 * 16, dtype=torch.bfloat16)
    query = PLAIN_GLUE.rotate_and_store(qkv, *one.slots, *one.angles)
    close = {"atol": 0.01, "rtol": 0.01}
    torch.testing.assert_close(compiled.rotate_and_store(qkv, *other.slots, *other.angles), query, **close)
    torch.testing.assert_close(other.keys, one.keys, **close)
    torch.testing.assert_close(other.values, one.values)
    torch.testing.assert_close(compiled.activate(qkv), PLAIN_GLUE.activate(qkv), **close)
    for a, b in zip(compiled.add_norm(qkv, qkv), PLAIN_GLUE.add_norm(qkv, qkv), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_stack_without_backends_is_refused():
    with pytest.raises(UnsupportedError, match="at least one"):
        decode_stack.Stacks(SMALL_STACK, "bf16", [], CPU, PLAIN_GLUE)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_decode_step_of_both_stacks_agrees(name):
    """Reference kernels on the CPU; the figures are what the told times make them."""
    stacks = decode_stack.Stacks(SMALL_STACK, name, ["reference"], CPU, PLAIN_GLUE)
    lines = []
    rows = decode_stack.measure(stacks, [1, 3], told({"dense": 6.0, "reference": 4.0}), lines.append)
    assert [(row["backend"], row["m"], row["ratio_vs_dense"]) for row in rows] == [
        ("dense", 1, 1.0),
        ("reference", 1, 1.5),
        ("dense", 3, 1.0),
        ("reference", 3, 1.5),
    ]
    assert rows[0]["weight_gbs"] == pytest.approx(2 * 2 * (128 + 64 + 192 * 1 + 96) * 64 / 6.0 / 1e3)
    assert 0 <= rows[1]["distance"] < 0.01
    assert "attention by" in lines[0]
    assert "x1.500 of dense" in lines[2]


def test_a_stack_with_wrong_products_is_not_timed(monkeypatch):
    right = ReferenceBackend.linear
    monkeypatch.setattr(ReferenceBackend, "linear", lambda *a: right(*a) * 1.2)
    stacks = decode_stack.Stacks(SMALL_STACK, "bf16", ["reference"], CPU, PLAIN_GLUE)
    with pytest.raises(NumericsError, match="off dense"):
        decode_stack.measure(stacks, [1], told({"dense": 1.0, "reference": 1.0}), lambda line: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_s_commands_say_that_there_is_none(capsys):
    assert decode_stack.main([]) == 2
    assert gpu_session.main([]) == 2
    assert capsys.readouterr().err.count("no NVIDIA GPU") == 2
    assert gpu_session.main(["abacus"]) == 2
    assert gpu_session.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"# {piece.name}" in listed for piece in gpu_session.PIECES)


def test_every_command_of_a_session_is_one_that_exists(monkeypatch, tmp_path, capsys):
    """Its modules take the options, its test files and test names are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    mains = {"bench.kernels_cuda": kernels_cuda.main, "bench.decode_stack": decode_stack.main}
    tried = set()
    for command in (command for piece in gpu_session.PIECES for command in piece.commands):
        words = shlex.split(command)
        if words[:2] == ["python", "-m"] and words[2] in mains:
            assert mains[words[2]](words[3:]) == 2  # understood, but there is no GPU
            assert "no NVIDIA GPU" in capsys.readouterr().err
            tried.add(words[2])
    assert tried == set(mains)
    for piece in gpu_session.PIECES:
        for command in piece.commands:
            files = [word for word in command.split() if word.startswith("tests/")]
            assert all((gpu_session.Path(__file__).parents[2] / name).exists() for name in files)
            assert piece.limit_s < 600 or piece.name == "serve"


@pytest.mark.parametrize(("variable", "ending"), [(None, ""), ("cusparselt", "-prefill")])
def test_serving_with_both_forms_is_kept_apart_and_recorded(monkeypatch, tmp_path, variable, ending):
    """The shell's part of the command: what the variable adds to it."""
    if variable is None:
        monkeypatch.delenv("VLLM_SPARSE_PREFILL", raising=False)
    else:
        monkeypatch.setenv("VLLM_SPARSE_PREFILL", variable)
    monkeypatch.setenv("DENSE", "a model")
    monkeypatch.setenv("SPARSE", "another")
    printed = tmp_path / "words"
    serve = next(piece for piece in gpu_session.PIECES if piece.name == "serve")
    command = serve.commands[0].replace("python -m converters.cli", "printf '%s\\n'") + f" > {printed}"
    assert gpu_session.run_piece(gpu_session.Piece("serve", "", (command,)), lambda line: None) == 0
    words = printed.read_text().splitlines()
    assert words[:6] == ["bench", "compare", "--dense", "a model", "--compressed", "another"]
    recorded = [] if variable is None else ["--env", "VLLM_SPARSE_PREFILL=cusparselt"]
    assert words[6:] == [
        *recorded,
        *("--json", f"out/gpu/compare{ending}.json", "--html", f"out/gpu/compare{ending}.html"),
    ]


def test_a_session_stops_at_what_fails(tmp_path):
    said = []
    pieces = [
        gpu_session.Piece("one", "first", (f"touch {tmp_path}/a", "exit 3", f"touch {tmp_path}/b")),
        gpu_session.Piece("two", "second", (f"touch {tmp_path}/c",)),
        gpu_session.Piece("slow", "third", ("sleep 30",), limit_s=1),
    ]
    assert gpu_session.run(pieces, False, said.append) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert "failed with 3" in said[-1]
    assert gpu_session.run(pieces, True, said.append) == 1
    assert (tmp_path / "c").exists()
    assert "failed with 124" in said[-1]
    assert gpu_session.run(pieces[1:2], False, said.append) == 0


def test_a_command_that_is_stopped_leaves_nothing_running(tmp_path):
    """What it began would hold the GPU while the next piece is timed; here two children of the shell."""
    began = tmp_path / "began"
    command = f"sleep 60 & echo $! >{began}; sleep 60; echo done"
    said = []
    assert gpu_session.run_piece(gpu_session.Piece("slow", "", (command,), limit_s=1), said.append) == 124
    assert "stopped after 1 s" in said[-1]
    child = int(began.read_text())
    assert not [process for process in processes.family(child) if process.alive()]


def test_tuning_tries_the_cuda_kernel_only_where_it_can_be_had(monkeypatch):
    spec = make_spec("bf16", 4096, 4096)
    for loaded, expected in (((None, "not built"), False), ((object(), None), True)):
        monkeypatch.setattr(library, "_load", lambda loaded=loaded: loaded)
        mma_sp.unsupported_reason.cache_clear()
        try:
            routes = {config.route for config in kernels_tune.all_candidates(spec, 8, H200)}
        finally:
            mma_sp.unsupported_reason.cache_clear()
        assert (Route.MMA_SP in routes) == expected
        assert Route.DOT in routes


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """A tuner on a pretended H200: what it times, what it says and where it writes its table."""
    ops = pytest.importorskip("vllm_sparse.kernels.triton.ops")
    pretended = SimpleNamespace(timed={}, specs=[], lines=[], path=tmp_path / "tuned" / "table.json")

    def best(spec, m, configs, device, progress):
        pretended.timed[spec.weight.value, m] = configs
        pretended.specs.append(spec)
        return configs[0], 2.5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops, "machine_of", lambda index: H200)
    monkeypatch.setattr(kernels_tune, "table_path", lambda name: pretended.path)
    monkeypatch.setattr(kernels_tune, "_best", best)
    monkeypatch.setattr(library, "_load", lambda: (object(), None))
    monkeypatch.setattr(selftest, "failure", lambda device, machine, programs: None)
    mma_sp.unsupported_reason.cache_clear()
    yield pretended
    mma_sp.unsupported_reason.cache_clear()


def test_tuning_one_route_still_times_what_it_has_to_beat(tuning):
    shape = Shape(WeightFormat.BF16, 4096, 4096)
    before, other = Config(Route.DOT, 128, 16, 2, 8, 2), Shape(WeightFormat.INT8, 64, 256)
    tuning.path.parent.mkdir()
    entries = {(shape, 8): (before, 7.25), (other, 1): (Config(Route.SELECT, 16, 1), 4.5)}
    tables.write_table(tuning.path, H200, {}, entries)
    kernels_tune.tune([(4096, 4096)], [8, 128], ["bf16"], tuning.lines.append, [Route.MMA_SP])
    configs = tuning.timed["bf16", 8]
    assert configs[-2:] == [default_config(shape, 8, H200), before]
    assert {config.route for config in configs[:-2]} == {Route.MMA_SP}
    assert ("bf16", 128) not in tuning.timed
    assert "no candidate among mma_sp" in tuning.lines[0]
    written = tables.read_times(tuning.path)
    assert written == {(shape, 8): (configs[0], 2.5), (other, 1): entries[other, 1]}


def test_tuning_times_quantised_activations_apart(tuning):
    kernels_tune.tune([(4096, 4096)], [1], ["fp8", "w8a8-fp8"], tuning.lines.append)
    quants = [ActivationQuant.NONE, ActivationQuant.FP8_PER_TOKEN]
    assert [spec.activation_quant for spec in tuning.specs] == quants
    assert list(tuning.timed) == [("fp8_e4m3", 1)]
    assert {config.route for config in tuning.timed["fp8_e4m3", 1]} == {
        Route.SELECT,
        Route.MMA_SP,
        Route.WGMMA_SP,
    }


@pytest.mark.parametrize("reason", [None, "wrong by 7"])
def test_programs_that_take_tile_after_tile_are_tested_before_they_are_timed(tuning, monkeypatch, reason):
    """Loading a layer does not; what goes wrong is not timed, and so enters no table."""
    asked = []

    def failure(device, machine, programs):
        assert not tuning.timed
        asked.append(programs)
        return reason

    monkeypatch.setattr(selftest, "failure", failure)
    kernels_tune.tune([(28672, 4096)], [8], ["bf16"], tuning.lines.append, [Route.MMA_SP])
    assert not asked
    tuning.timed.clear()
    routes = [Route.WGMMA_SP_TMA]
    kernels_tune.tune([(28672, 4096)], [256, 512], ["bf16"], tuning.lines.append, routes)
    assert asked == [True]
    for m in (256, 512):
        assert {config.programs for config in tuning.timed["bf16", m]} == ({0} if reason else {0, 132})
    assert any("wrong by 7" in line for line in tuning.lines) == (reason is not None)


def test_a_table_that_cannot_be_written_is_said_before_anything_is_timed(tuning):
    tuning.path.mkdir(parents=True)
    with pytest.raises(UserError, match="is a directory"):
        kernels_tune.tune([(4096, 4096)], [8], ["bf16"], tuning.lines.append)
    assert not tuning.timed


@pytest.mark.parametrize(("name", "number"), [("fp8", 0), ("w8a8-int8", 1), ("w8a8-fp8", 2)])
def test_what_is_timed_quantises_as_the_layer_does(monkeypatch, name, number):
    """The operator's number of the quantisation, in the first round and among the finalists."""
    ops = pytest.importorskip("vllm_sparse.kernels.triton.ops")
    asked = []
    monkeypatch.setattr(ops, "linear", lambda *arguments: asked.append(arguments[8:]))
    monkeypatch.setattr(kernels_tune, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(kernels_tune, "time_together", lambda calls, replays=30: told({})(calls))
    config = Config(Route.DOT, 32, 16, 1, 4, 2)
    assert kernels_tune._best(make_spec(name, 64, 256), 4, [config], CPU, print) == (config, 9.0)
    assert asked == 2 * [(number, config)]


def test_kernels_are_compiled_before_the_first_is_timed(tuning, monkeypatch):
    compiled, jobs = [], []

    def ahead(problems, count, progress):
        assert not tuning.timed
        jobs.append(count)
        compiled.extend(problem for problem, _ in problems)

    monkeypatch.setattr(kernels_tune, "compile_ahead", ahead)
    kernels_tune.tune([(4096, 4096)], [1, 8], ["bf16"], tuning.lines.append, jobs=6)
    assert compiled == [kernels_tune.Problem("bf16", 4096, 4096, m) for m in (1, 8)]
    assert jobs == [6]
    assert len(tuning.timed) == 2


def test_each_triton_configuration_is_compiled_once_by_some_worker(monkeypatch):
    done, lines, pools = [], [], []

    def chunk(problem, configs):
        if problem.n == 32:
            raise RuntimeError("out of memory")
        done.extend((problem, config) for config in configs)

    def start_pool(jobs):
        pools.append(jobs)
        return ThreadPoolExecutor(jobs)

    monkeypatch.setattr(kernels_tune, "compile_chunk", chunk)
    good, bad = kernels_tune.Problem("bf16", 64, 256, 1), kernels_tune.Problem("bf16", 32, 256, 1)
    configs = [Config(Route.SELECT, 16, 1, 1, 4, stages) for stages in range(1, 11)]
    mma = Config(Route.MMA_SP, 64, 8, 1, 4, 2)
    kernels_tune.compile_ahead([(good, [*configs, mma]), (bad, configs[:1])], 16, lines.append, start_pool)
    assert sorted(config.stages for _, config in done) == list(range(1, 11))
    assert {problem for problem, _ in done} == {good}
    assert pools == [4]  # no more workers than pieces of work
    assert any("out of memory" in line for line in lines)
    kernels_tune.compile_ahead([(good, [mma])], 16, lines.append, start_pool)
    assert pools == [4]


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4-g128"])
def test_a_worker_launches_what_the_timing_launches(monkeypatch, name):
    """The same types and sizes of operands, and past a configuration that does not fit."""
    errors = pytest.importorskip("triton.runtime.errors")
    ops = pytest.importorskip("vllm_sparse.kernels.triton.ops")
    seen = []

    def linear(*arguments):
        seen.append(arguments)
        if len(seen) == 1:
            raise errors.OutOfResources(300, 200, "shared memory")

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the backend pack on the CPU
    monkeypatch.setattr(ops, "linear", linear)
    configs = [Config(Route.SELECT, 16, 4), Config(Route.DOT, 32, 16)]
    kernels_tune.compile_chunk(kernels_tune.Problem(name, 64, 512, 4), configs, "cpu")
    assert [arguments[-1] for arguments in seen] == configs
    x, packed, scale = seen[1][:3]
    spec = make_spec(name, 64, 512)
    real = kernels_tune.get_backend("triton").pack(spec, random_weight(spec, CPU))
    assert x.shape == (4, 512)
    assert (packed.shape, packed.dtype) == (real.packed.shape, real.packed.dtype)
    if real.scale is None:
        assert scale is None
    else:
        assert (scale.shape, scale.dtype) == (real.scale.shape, real.scale.dtype)
