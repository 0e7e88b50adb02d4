"""Conversations of several turns: what is read from files, and what the server is really asked."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench import probe, runner
from bench.conversations import read_conversations, sample
from bench.loopback import LoopbackServer, Script
from bench.runner import RunConfig, run
from bench.tokenizer import load_tokenizer
from bench.workloads import WorkloadSpec, build
from vllm_sparse.errors import FormatError, UserError


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """Three conversations of three turns; answers of turn k have k + 1 words."""
    texts = [(f"w{i} w10", "w1", f"w{i} w11", "w1 w2", f"w{i} w12", "w1 w2 w3") for i in range(3)]
    conversations = [{"conversations": turns(*three)} for three in texts]
    return write(tmp_path / "share.json", conversations)


def test_both_vocabularies_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.json",
        [
            {"conversations": [{"from": "system", "value": "be good"}, *turns("a", "b", "c")]},
            {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
            {"conversations": [{"from": "gpt", "value": "early"}, *turns("f", "g")]},
            {"conversations": turns("no answer")},
        ],
    )
    assert read_conversations(path) == [[("a", "b")], [("d", "e")], [("f", "g")]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("{}", "expected a JSON list"), ("[1, {}]", "no conversation with a question")],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_conversations(path)


def test_turns_are_cut_to_the_context(share: Path, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)

    def lengths(context: int | None, most: int = 0) -> list[int]:
        rng = np.random.default_rng(0)
        chosen = sample(share, 3, turns=most, output_len=None, tokenizer=tokenizer, context=context, rng=rng)
        return [len(one) for one in chosen]

    assert lengths(None) == [3, 3, 3]
    assert lengths(None, most=2) == [2, 2, 2]
    # Questions of 2 words, answers of 1 and 2, and 16 tokens of slack for each turn.
    assert lengths(39) == [2, 2, 2]
    assert lengths(38) == [1, 1, 1]
    with pytest.raises(UserError, match="0 usable conversations"):
        lengths(18)


@pytest.mark.parametrize(("endpoint", "workers"), [("chat", 1), ("chat", 2), ("completions", 1)])
def test_later_turns_carry_the_servers_answers(
    share: Path, tokenizer_dir: Path, endpoint: str, workers: int
) -> None:
    spec = WorkloadSpec(dataset="sharegpt", num_requests=3, output_len=None, path=share, turns=0)
    with LoopbackServer(Script(ttft_ms=5, gap_ms=1, keep_prompts=True)) as server:
        config = RunConfig(
            server.base_url, workload=spec, endpoint=endpoint, tokenizer=tokenizer_dir, concurrency=2,
            num_warmups=0, workers=workers,
        )  # fmt: skip
        result = run(config)
        asked = [note["prompt"] for note in server.truth()]
    assert result.ok
    assert result.report["requests"]["planned"] == 9
    assert len(asked) == 9
    # The scripted server answers " x" for every token; the recorded answers only say how many.
    if endpoint == "chat":
        longest = next(prompt for prompt in asked if len(prompt) == 5 and prompt[0]["content"] == "w1 w10")
        assert longest == [
            {"role": "user", "content": "w1 w10"},
            {"role": "assistant", "content": " x"},
            {"role": "user", "content": "w1 w11"},
            {"role": "assistant", "content": " x x"},
            {"role": "user", "content": "w1 w12"},
        ]
    else:
        assert "w1 w10\n x\nw1 w11\n x x\nw1 w12" in asked
    by_turn = result.report["turns"]
    assert [(entry["turn"], entry["n"]) for entry in by_turn] == [(1, 3), (2, 3), (3, 3)]
    assert all(a["prompt_tokens"] < b["prompt_tokens"] for a, b in pairwise(by_turn))
    assert sorted(result.report["raw"]["turn"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_turns_come_one_after_the_other_with_time_to_think(tokenizer_dir: Path) -> None:
    spec = WorkloadSpec(num_requests=4, input_len=5, output_len=3, turns=3, think_time_s=0.2)
    with LoopbackServer(Script(ttft_ms=10, gap_ms=1)) as server:
        config = RunConfig(server.base_url, workload=spec, tokenizer=tokenizer_dir, request_rate=100.0)
        report = run(config).report
    raw = report["raw"]
    assert report["requests"]["completed"] == 12
    for first in range(0, 12, 3):
        for a, b in pairwise(range(first, first + 3)):
            assert raw["scheduled_ms"][b] == pytest.approx(raw["finished_ms"][a] + 200, abs=0.01)
            assert raw["dispatched_ms"][b] >= raw["scheduled_ms"][b]


def test_random_conversations_differ_and_keep_their_lengths(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    workload = build(
        WorkloadSpec(num_requests=5, input_len=7, output_len=2, turns=4), tokenizer, None, chat=True
    )
    assert [len(one) for one in workload.conversations] == [4] * 5
    assert len(workload.firsts()) == 5
    assert len({request.prompt for request in workload.requests}) == 20
    assert all(len(tokenizer.encode(request.prompt)) == 7 for request in workload.requests)


def test_the_served_models_own_tokenizer_is_found(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"vocab_size": 201}')
    facts = probe.ServerFacts(["m"], {"m": str(tmp_path / "m")}, None, None)
    spec = WorkloadSpec(num_requests=2, input_len=5, output_len=3, turns=2)
    workload, _ = runner.make_workloads(RunConfig("http://127.0.0.1:9", model="m", workload=spec), facts)
    assert [len(request.prompt.split()) for request in workload.requests] == [5] * 4


def test_a_failed_turn_ends_its_conversation_and_the_rest_is_accounted_for(tokenizer_dir: Path) -> None:
    spec = WorkloadSpec(num_requests=3, input_len=5, output_len=3, turns=3)
    with LoopbackServer(Script(ttft_ms=5, faults={0: "status_500"})) as server:
        result = run(RunConfig(server.base_url, workload=spec, tokenizer=tokenizer_dir, num_warmups=0))
    requests = result.report["requests"]
    assert not result.ok
    assert requests == requests | {"planned": 9, "sent": 7, "completed": 6, "failed": 1, "not_sent": 2}
    assert "2 later turns were not sent" in " ".join(result.report["warnings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": -1}, "--turns is -1"),
        ({"turns": 0}, "sharegpt"),
        ({"turns": 2, "dataset": "trace", "path": Path("x")}, "does not go with --dataset trace"),
        ({"turns": 2, "think_time_s": -1.0}, "--think-time"),
        ({"turns": 2}, "need --tokenizer"),
    ],
)
def test_impossible_conversations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(replace(WorkloadSpec(), **changes), None, None, chat=False)


def test_warmups_are_not_prompts_of_the_run(share: Path, tokenizer_dir: Path) -> None:
    spec = WorkloadSpec(dataset="sharegpt", num_requests=3, output_len=2, path=share, turns=1)
    with LoopbackServer(Script(ttft_ms=5, gap_ms=1, keep_prompts=True)) as server:
        assert run(RunConfig(server.base_url, workload=spec, num_warmups=3, tokenizer=tokenizer_dir)).ok
        prompts = [note["prompt"] for note in server.truth()]
    warmups, measured = prompts[:3], prompts[3:]
    assert not any(a.startswith(b) or b.startswith(a) for a in warmups for b in measured)
