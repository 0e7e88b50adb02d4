import json
from pathlib import Path

import pytest

from bench.tokenizer import load_tokenizer, vocabulary_size
from bench.workloads import WorkloadSpec, build
from vllm_sparse.errors import FormatError, UserError


def test_random_prompts_have_the_length_asked_and_differ() -> None:
    requests = build(
        WorkloadSpec(num_requests=50, input_len=33, output_len=9), None, None, chat=False
    ).requests
    assert all(len(request.prompt) == 33 and request.output_len == 9 for request in requests)
    assert len({tuple(request.prompt) for request in requests}) == 50
    assert all(0 <= token < 1000 for request in requests for token in request.prompt)


def test_seed_decides_everything() -> None:
    def prompts(seed: int) -> list[object]:
        spec = WorkloadSpec(num_requests=4, input_len=8, seed=seed, range_ratio=0.5)
        return [request.prompt for request in build(spec, None, None, chat=False).requests]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_lengths_vary_within_the_range() -> None:
    spec = WorkloadSpec(num_requests=300, input_len=100, output_len=10, range_ratio=0.2)
    requests = build(spec, None, 50, chat=False).requests
    lengths = [len(request.prompt) for request in requests]
    assert (min(lengths), max(lengths)) == (80, 120)
    assert {request.output_len for request in requests} == {8, 9, 10, 11, 12}
    assert max(max(request.prompt) for request in requests) < 50


def test_prompts_avoid_special_tokens_and_text_keeps_its_length(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    spec = WorkloadSpec(num_requests=20, input_len=40)
    for request in build(spec, tokenizer, None, chat=False).requests:
        assert 0 not in request.prompt
    for request in build(spec, tokenizer, None, chat=True).requests:
        assert isinstance(request.prompt, str)
        assert len(tokenizer.encode(request.prompt)) == 40


def test_prefixes_are_shared_and_the_rest_is_not() -> None:
    spec = WorkloadSpec(dataset="prefix", num_requests=40, input_len=10, prefix_len=30, num_prefixes=3)
    requests = build(spec, None, None, chat=False).requests
    assert {len(request.prompt) for request in requests} == {40}
    assert len({tuple(request.prompt[:30]) for request in requests}) == 3
    assert len({tuple(request.prompt[30:]) for request in requests}) == 40


def test_corpus_windows_come_from_the_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(f"w{i % 200}" for i in range(500)))
    spec = WorkloadSpec(dataset="text", num_requests=10, input_len=20, path=corpus)
    tokenizer = load_tokenizer(tokenizer_dir)
    requests = build(spec, tokenizer, None, chat=False).requests
    for request in requests:
        steps = {(b - a) % 200 for a, b in zip(request.prompt, request.prompt[1:], strict=False)}
        assert steps == {1}
    with pytest.raises(FormatError, match="longer corpus"):
        build(
            WorkloadSpec(dataset="text", num_requests=1, input_len=600, path=corpus),
            tokenizer,
            None,
            chat=False,
        )


def _conversations(path: Path, count: int) -> Path:
    turns = [
        {
            "conversations": [
                {"from": "human", "value": f"w1 w2 w{i}"},
                {"from": "gpt", "value": "w1 " * (i + 1)},
            ]
        }
        for i in range(count)
    ]
    path.write_text(json.dumps([{"conversations": []}, {"id": 1}, *turns]))
    return path


def test_sharegpt_takes_question_and_answer_length(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = _conversations(tmp_path / "share.json", 6)
    spec = WorkloadSpec(dataset="sharegpt", num_requests=6, output_len=None, path=path)
    requests = build(spec, load_tokenizer(tokenizer_dir), None, chat=True).requests
    assert sorted(request.output_len for request in requests) == [1, 2, 3, 4, 5, 6]
    assert [request.prompt for request in requests] == [f"w1 w2 w{r.output_len - 1}" for r in requests]
    with pytest.raises(UserError, match="6 usable conversations"):
        build(WorkloadSpec(dataset="sharegpt", num_requests=7, path=path), None, None, chat=True)


def test_trace_gives_lengths_and_times(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        "\n".join(json.dumps({"timestamp": t, "input_length": 4 + t, "output_length": 2}) for t in (0, 5))
    )
    workload = build(WorkloadSpec(dataset="trace", output_len=None, path=path), None, None, chat=False)
    assert [len(request.prompt) for request in workload.requests] == [4, 9]
    assert workload.arrivals == [0.0, 0.005]


@pytest.mark.parametrize(
    ("spec", "chat", "message"),
    [
        (WorkloadSpec(dataset="nope"), False, "choose one of"),
        (WorkloadSpec(num_requests=0), False, "at least 1"),
        (WorkloadSpec(range_ratio=1.0), False, "range-ratio"),
        (WorkloadSpec(dataset="text"), False, "dataset-path"),
        (WorkloadSpec(), True, "--tokenizer"),
    ],
)
def test_impossible_workloads_are_refused(spec: WorkloadSpec, chat: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(spec, None, None, chat=chat)


def test_missing_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such directory"):
        load_tokenizer(tmp_path / "none")


def test_vocabulary_size(tmp_path: Path) -> None:
    assert vocabulary_size(tmp_path) is None
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert vocabulary_size(tmp_path) == 77


def test_times_alone_take_their_lengths_from_the_options(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("0\n1\n2\n")
    spec = WorkloadSpec(dataset="trace", num_requests=3, input_len=9, output_len=4, path=path)
    workload = build(spec, None, None, chat=False)
    assert [(len(request.prompt), request.output_len) for request in workload.requests] == [(9, 4)] * 3
    assert workload.arrivals == [0.0, 1.0, 2.0]


def test_equal_block_hashes_of_a_trace_give_equal_prompt_starts(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": i, "input_length": n, "output_length": 1, "hash_ids": hashes}
        for i, (n, hashes) in enumerate([(1100, [7, 8, 9]), (1100, [7, 8, 10]), (600, [11, 12])])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = WorkloadSpec(dataset="trace", num_requests=3, path=path, output_len=None)
    a, b, c = (request.prompt for request in build(spec, None, None, chat=False).requests)
    assert [len(prompt) for prompt in (a, b, c)] == [1100, 1100, 600]
    assert a[:1024] == b[:1024]
    assert a[1024:] != b[1024:]
    assert a[:512] != c[:512]
