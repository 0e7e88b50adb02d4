from collections.abc import Callable
from pathlib import Path

import pytest

from bench.estimate import Speed, in_words, of_directory, of_server
from bench.loopback import LoopbackServer, Script


def test_closed_loop_by_hand() -> None:
    speed = Speed(prompt_token_s=0.001, step_s=0.01)
    # Two turns of four users: 4 x 100 prompt tokens, then 50 steps.
    assert speed.seconds(8, 4, 100, 50) == pytest.approx(2 * (0.4 + 0.5))
    assert speed.seconds(3, 64, 100, 50) == pytest.approx(0.3 + 0.5)


def test_bigger_checkpoints_take_longer(make_model: Callable[..., Path]) -> None:
    small, big = of_directory(make_model("a", weights=10)), of_directory(make_model("b", weights=10**7))
    assert 0 < small.step_s < big.step_s
    assert 0 < small.prompt_token_s < big.prompt_token_s


def test_a_server_is_asked_once() -> None:
    with LoopbackServer(Script(ttft_ms=64, gap_ms=20)) as server:
        speed = of_server(server.base_url)
    assert speed is not None
    # A busy machine only adds to what the server was told to take.
    assert speed.step_s > 0.018
    assert speed.prompt_token_s > 0.0019
    assert of_server(server.base_url) is None


def test_words() -> None:
    assert [in_words(s) for s in (12.3, 600, 7200)] == ["12 s", "10 min", "2.0 h"]
