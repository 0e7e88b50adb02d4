from pathlib import Path

import numpy as np
import pytest

from bench.arrivals import open_loop, ramp, read_trace
from vllm_sparse.errors import FormatError, UserError


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, float("inf")])
def test_rate_and_burstiness(burstiness: float) -> None:
    times = open_loop(20_000, 50.0, burstiness, seed=1)
    assert times[-1] == pytest.approx(20_000 / 50)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    variation = gaps.std() / gaps.mean()
    assert variation == pytest.approx(1 / np.sqrt(burstiness), rel=0.05, abs=1e-6)


def test_infinite_rate_sends_everything_at_once() -> None:
    assert open_loop(5, float("inf"), 1.0, 0).tolist() == [0.0] * 5


def test_same_seed_same_schedule() -> None:
    assert (open_loop(50, 3, 1, 7) == open_loop(50, 3, 1, 7)).all()
    assert (open_loop(50, 3, 1, 7) != open_loop(50, 3, 1, 8)).any()


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_impossible_schedules_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(UserError, match="must be positive"):
        open_loop(3, rate, burstiness, 0)


def test_gaps_that_are_all_0_are_refused() -> None:
    with pytest.raises(UserError, match="leaves no gap"):
        open_loop(3, 100, 1e-5, 0)


def test_ramp_goes_from_one_rate_to_the_other() -> None:
    times = ramp(1000, 10, 30)
    assert times[-1] == pytest.approx(50)
    rates = 1 / np.diff(times)
    assert rates[0] == pytest.approx(10, rel=0.02)
    assert rates[-1] == pytest.approx(30, rel=0.02)
    assert ramp(4, 2, 2).tolist() == [0.5, 1.0, 1.5, 2.0]


def test_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 7, "output_length": 2, "hash_ids": [1]}\n\n'
        '{"timestamp": 1000, "input_length": 5, "output_length": 3, "hash_ids": [2]}\n'
    )
    first, second = read_trace(path, speed=2.0)
    assert (first.at, first.input_len, first.output_len) == (0.0, 5, 3)
    assert (second.at, second.input_len, second.output_len) == (1.0, 7, 2)


def test_times_alone(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("# seconds\n12.5\n10\n\n11\n")
    entries = read_trace(path, speed=0.5)
    assert [entry.at for entry in entries] == [0.0, 2.0, 5.0]
    assert all(entry.input_len is None and entry.output_len is None for entry in entries)


def test_burstgpt_trace_leaves_out_failed_calls(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "47.5,GPT-4,417,276,693,Conversation log\n"
    )
    entries = read_trace(path)
    assert [(e.at, e.input_len, e.output_len) for e in entries] == [(0.0, 472, 18), (42.5, 417, 276)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{broken", "not JSON"),
        ("b.jsonl", "[1]", "expected a JSON object"),
        ("c.jsonl", '{"timestamp": 1, "input_length": 2}', "output_length"),
        ("d.csv", "Timestamp,Request tokens,Response tokens\nsoon,1,1\n", "not a number"),
        ("e.csv", "Timestamp,Request tokens,Response tokens\n1,1,0\n", "no request"),
        ("f.txt", "1\n2 s\n", "line 2: '2 s' is not a time"),
        ("h.txt", "1\nnan\n", "line 2: 'nan' is not a time"),
        ("i.csv", "Timestamp,Request tokens,Response tokens\n1,inf,1\n", "not a number"),
        ("j.csv", "Timestamp,Request tokens,Response tokens\n1,1,-4\n", "below 0"),
        ("k.csv", "Timestamp,\xff\n1,1\n", "not UTF-8"),
        ("g.jsonl", '{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": "x"}', "hash_ids"),
    ],
)
def test_bad_traces_say_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=message):
        read_trace(path)
