"""The quality suite: a tiny table end to end, resumed; statistics; the committed table."""

import json
from pathlib import Path

import pytest
import yaml

from converters.train.quality import runs
from converters.train.quality.runs import best_try, chosen_jobs, jobs_of, read_results, run_suite
from converters.train.quality.suite import Suite, check_equal_tries, job_of, merged, read_suite
from converters.train.quality.table import BEGIN, END, Figure, insert, render, verdict, write_table
from converters.train.recipes import validate_recipe
from vllm_sparse.errors import FormatError

ROOT = Path(__file__).resolve().parents[2]


def values(text_file: Path, trained_dir: Path, folder: Path) -> dict:
    return {
        "base": str(folder / "unused.yaml"),
        "model": str(trained_dir),
        "work": str(folder / "work"),
        "results": str(folder / "results.jsonl"),
        "curve": str(folder / "curve.csv"),
        "table": str(folder / "page.md"),
        "seeds": [0, 1],
        "recipe": {
            "data": {"source": str(text_file), "sequence_length": 32},
            "run": {"device": "cpu", "precision": "fp32"},
            "eval_tokens": 1000,
        },
        "groups": [
            {
                "title": "2:4",
                "reference": "wanda",
                "rows": [
                    {
                        "name": "magnitude",
                        "title": "magnitude",
                        "recipe": {"method": "magnitude"},
                        "seeds": 1,
                    },
                    {"name": "wanda", "title": "Wanda", "recipe": {"method": "wanda", "samples": 4}},
                    {
                        "name": "tuned",
                        "title": "Wanda, trained",
                        "source": "wanda",
                        "recipe": {"method": "finetune", "optimiser": {"steps": 4, "warmup": 1}},
                        "tries": {"optimiser.lr": [1e-6, 3e-3]},
                    },
                ],
            }
        ],
        "orderings": ["tuned < wanda"],
    }


@pytest.fixture
def suite(text_file: Path, trained_dir: Path, tmp_path: Path) -> Suite:
    return validate_recipe(Suite, values(text_file, trained_dir, tmp_path))


def test_a_suite_runs_resumes_and_fills_its_table(suite: Suite, monkeypatch: pytest.MonkeyPatch):
    suite.table.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    run_suite(suite, ("tuned",), quiet=True)
    results = read_results(suite.results)
    # Its source came first, with both seeds; two tries and the better one again with the other seed.
    assert sorted(r["row"] for r in results.values()) == ["tuned"] * 3 + ["wanda"] * 2
    group, row = suite.row("tuned")
    chosen = chosen_jobs(suite, group, row, results)
    assert [job.seed for job in chosen] == [0, 1]
    assert chosen[0].settings == {"optimiser.lr": 3e-3}
    tuned = [results[job.key] for job in chosen]
    wanda = {r["seed"]: r for r in results.values() if r["row"] == "wanda"}
    for run in tuned:
        assert run["input_perplexity"] == wanda[run["seed"]]["perplexity"]
        assert run["perplexity"] < run["input_perplexity"]
        assert run["figures"]["training_tokens"] == 4 * 4 * 32

    calls = []
    original = runs.run_job
    monkeypatch.setattr(
        runs, "run_job", lambda suite, job, *rest: calls.append(job.row) or original(suite, job, *rest)
    )
    run_suite(suite, quiet=True)
    assert calls == ["magnitude"]
    write_table(suite)
    page = suite.table.read_text()
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"{END}\nafter\n")
    assert "| Wanda, trained | " in page
    assert "lr 0.003" in page
    assert "| tuned < wanda | holds (" in page
    assert suite.curve.read_text().startswith("steps,training_loss,heldout_perplexity\n150,")
    # A changed recipe is another run; the old one is not mistaken for it.
    other = suite.model_copy(update={"recipe": merged(suite.recipe, {"eval_tokens": 999})})
    assert chosen_jobs(other, group, row, results) == []
    assert len(jobs_of(other, group, row, results)) == 2


def test_settings_are_chosen_only_when_all_tries_are_done(suite: Suite):
    group, row = suite.row("tuned")
    jobs = [job_of(suite, group, row, 0, settings) for settings in row.settings()]
    one = {jobs[0].key: {"perplexity": 3.0}}
    assert best_try(jobs, one) is None
    assert best_try(jobs, one | {jobs[1].key: {"perplexity": 2.0}}) == jobs[1]


def test_means_errors_and_verdicts():
    figure = Figure.of([1.0, 2.0, 3.0])
    assert (figure.mean, figure.error) == (2.0, pytest.approx(1 / 3**0.5))
    assert figure.text(1) == "2.0 ± 0.6"
    assert Figure.of([2.5]).text(1) == "2.5"
    far, near = Figure(4.0, 0.1, 3), Figure(2.1, 0.6, 3)
    assert verdict(figure, far).startswith("holds (+2.00")
    assert verdict(far, figure).startswith("does not hold (-2.00")
    assert verdict(figure, near).startswith("undecided")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: unknown key"),
        ({"orderings": ["tuned > wanda"]}, "write LEFT < RIGHT"),
        ({"orderings": ["tuned < gone"]}, "no such rows: gone"),
    ],
)
def test_a_wrong_suite_is_refused(
    change: dict, message: str, text_file: Path, trained_dir: Path, tmp_path: Path
):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(values(text_file, trained_dir, tmp_path) | change))
    with pytest.raises(FormatError, match=message):
        read_suite(path)


def test_unequal_numbers_of_tries_are_refused(text_file: Path, trained_dir: Path, tmp_path: Path):
    raw = values(text_file, trained_dir, tmp_path)
    raw["groups"][0]["rows"][1]["tries"] = {"samples": [4, 8, 16]}
    with pytest.raises(FormatError, match="wanda 3, tuned 2"):
        check_equal_tries(validate_recipe(Suite, raw))


def test_a_page_without_markers_is_refused():
    with pytest.raises(FormatError, match=r"page\.md lacks"):
        insert("text", "table", "page.md")


def test_the_committed_page_is_what_the_committed_results_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    suite = read_suite(Path("docs/quality/suite.yaml"))
    check_equal_tries(suite)
    page = suite.table.read_text(encoding="utf-8")
    assert page == insert(page, render(suite), "quality.md")
    assert all(json.loads(line)["key"] for line in suite.results.read_text().splitlines())
