import math
from pathlib import Path

import numpy as np
import pytest

from bench.loopback import LoopbackServer, Script, scripted_logprobs
from bench.parity import compare, perplexity, random_prompts, score, text_prompts
from vllm_sparse.errors import FormatError, UserError

PROMPTS = np.random.default_rng(0).integers(0, 500, size=(9, 40)).tolist()


@pytest.fixture(scope="module")
def servers() -> tuple[LoopbackServer, LoopbackServer]:
    with LoopbackServer(Script()) as plain, LoopbackServer(Script(logprob_shift=0.25)) as shifted:
        yield plain, shifted


def test_scores_are_the_servers_logprobs(servers: tuple[LoopbackServer, LoopbackServer]) -> None:
    scores = score(servers[0].base_url, "loopback", PROMPTS)
    expected = [
        row[str(t)]["logprob"]
        for p in PROMPTS
        for t, row in zip(p[1:], scripted_logprobs(p)[1:], strict=True)
    ]
    assert scores.logprobs.tolist() == pytest.approx(expected)
    assert scores.positions == 9 * 39
    assert scores.lengths.tolist() == [39] * 9
    # Odd tokens have a better neighbour in the script.
    tokens = np.asarray([t for p in PROMPTS for t in p[1:]])
    assert scores.top1.tolist() == (tokens + tokens % 2).tolist()
    assert perplexity(scores) == pytest.approx(math.exp(-np.mean(expected)))


def test_distance(servers: tuple[LoopbackServer, LoopbackServer]) -> None:
    a, b = (score(server.base_url + "/v1", "loopback", PROMPTS) for server in servers)
    same, apart = compare(a, a), compare(a, b)
    assert (same.mean_dlogprob, same.top1_agreement, same.positions) == (0.0, 1.0, 351)
    # Every odd position is shifted by 0.25: 20 of each 39.
    assert apart.mean_dlogprob == pytest.approx(0.25 * 20 / 39)
    assert apart.max_dlogprob == pytest.approx(0.25)
    other = score(servers[0].base_url, "loopback", PROMPTS[:3])
    with pytest.raises(UserError, match="different prompts"):
        compare(a, other)


def test_refusals_are_one_sentence(servers: tuple[LoopbackServer, LoopbackServer]) -> None:
    url = servers[0].base_url
    with pytest.raises(UserError, match="does not exist"):
        score(url, "nobody", PROMPTS)
    with pytest.raises(UserError, match="at least two tokens"):
        score(url, "loopback", [[1]])
    with pytest.raises(UserError, match="no answer from"):
        score("http://127.0.0.1:9", "x", PROMPTS)


def test_prompts_from_text(tokenizer_dir: Path) -> None:
    text = " ".join(f"w{i % 200}" for i in range(5000))
    prompts = text_prompts(tokenizer_dir, text, context=50, positions=1000)
    assert len(prompts) == 21
    assert {len(prompt) for prompt in prompts} == {50}
    assert len({tuple(prompt) for prompt in prompts}) <= 21
    with pytest.raises(FormatError, match="longer text"):
        text_prompts(tokenizer_dir, text, context=50, positions=10_000)


def test_random_prompts_stay_in_the_vocabulary(model: Path) -> None:
    prompts = random_prompts(model, context=100, positions=4000)
    assert sum(len(prompt) - 1 for prompt in prompts) >= 4000
    assert max(map(max, prompts)) < 900
