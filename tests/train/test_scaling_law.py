import json
import math
from pathlib import Path

import pytest

from converters.train.cli import main
from converters.train.scaling_law import Point, fit
from vllm_sparse.errors import FormatError


def test_the_published_points_give_their_exponent():
    # LLaMA2-7B: dense 5.12, 5.58 after 7.5B tokens and 5.21 after 40B.
    points = [Point(7_500_000_000, math.log(5.58 / 5.12)), Point(40_000_000_000, math.log(5.21 / 5.12))]
    law = fit(points)
    assert law.b == pytest.approx(0.95, abs=0.01)
    assert law.residual == pytest.approx(0, abs=1e-9)
    assert law.excess(40e9) == pytest.approx(points[1].excess, rel=1e-9)
    assert law.tokens_for(points[0].excess) == pytest.approx(7.5e9, rel=1e-6)


def test_a_noisy_law_is_recovered_by_least_squares():
    factors = (1.05, 0.95, 1.02, 0.98)
    law = fit([Point(10**e, 3.0 * (10**e) ** -0.5 * f) for e, f in zip((5, 6, 7, 8), factors, strict=True)])
    assert law.b == pytest.approx(0.5, abs=0.02)
    assert 0.01 < law.residual < 0.1


def report(directory: Path, tokens: int, nll: float, method: str = "cast") -> Path:
    directory.mkdir()
    value = {
        "method": method, "figures": {"training_tokens": tokens}, "dense": {"nll": 2.0},
        "compressed": {"nll": nll},
    }  # fmt: skip
    (directory / "compression.json").write_text(json.dumps(value))
    return directory


def test_reports_of_finished_runs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [report(tmp_path / str(n), n, 2.0 + 100.0 * n**-0.5) for n in (10_000, 40_000, 160_000)]
    assert main(["scaling-law", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["b"] == pytest.approx(0.5)
    assert [point["tokens"] for point in found["points"]] == [10_000, 40_000, 160_000]
    assert main(["scaling-law", *map(str, runs)]) == 0
    assert "excess = 100 * tokens^-0.500" in capsys.readouterr().out


def test_runs_that_make_no_law_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(FormatError, match="at least two different budgets"):
        fit([Point(10, 1.0), Point(10, 2.0)])
    with pytest.raises(FormatError, match="both must be positive"):
        fit([Point(10, 1.0), Point(20, -0.1)])
    with pytest.raises(FormatError, match="does not fall"):
        fit([Point(10, 1.0), Point(20, 1.1)])
    one = report(tmp_path / "a", 10, 2.5)
    other = report(tmp_path / "b", 20, 2.4, "ast")
    assert main(["scaling-law", str(one), str(other)]) == 2
    assert "is a run of ast, the others of cast" in capsys.readouterr().err
    assert main(["scaling-law", str(one), str(tmp_path / "absent")]) == 2
    assert "not the report of a finished training run" in capsys.readouterr().err
