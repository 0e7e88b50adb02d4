"""Dense against compressed: the same load on both in turns, and the ratios with their uncertainty.

``compare_models(config)`` is the whole of ``vllm-sparse bench compare``. Its parts serve
others too: :func:`measure` runs scenarios on contestants of a :class:`bench.fleet.Fleet`;
:func:`bench.entries.scenario_entry` turns the reports of two contestants into one entry of the result.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import environment, parity, server_metrics
from bench.client import check_api_key
from bench.compare_store import Store
from bench.entries import is_complete, scenario_entry
from bench.fleet import (
    GIB,
    Contestant,
    Fleet,
    contestants,
    context_limit,
    fits_in_memory,
    identify,
    serve_flags,
    split_words,
)
from bench.observer import Observer, Reports
from bench.runner import run
from bench.scenarios import SCENARIOS, Scenario, fit
from bench.server import default_environment
from bench.tokenizer import vocabulary_size
from vllm_sparse.errors import UserError

__all__ = ["CompareConfig", "Observer", "Reports", "compare_models", "measure"]

SCHEMA = "vllm-sparse/bench-compare/1"


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """What to compare and how.

    Attributes:
        dense: Baseline model directory, or None when ``urls`` are given.
        compressed: Candidate directories.
        baselines: Further dense models to beat, for instance the int8 one; they are compared with ``dense``,
            and every candidate with each of them.
        baseline_args: Words for the ``vllm serve`` of every one of ``baselines``, after ``serve_args``.
        urls: Servers that are already up: the baseline first, then the candidates.
        baseline_urls: The same as ``baselines`` for servers that are already up.
        api_key: Bearer token for them.
        scenarios: Load shapes.
        repeats: Paired repeats of each; at least three for a usable interval.
        scale: Factor on the number of requests.
        seed: Seed of prompts; repeat r uses seed + r for every model.
        serve_args: Words for every ``vllm serve``.
        env: Settings for every server.
        servers: ``both`` up at once, ``one`` at a time, or ``auto`` by the memory there is.
        quality: Compare answers and perplexity too.
        quality_text: Text for that; None takes prose that comes with Python.
        log_dir: Where the servers' logs go.
        keep: Folder for what has been measured; the same comparison started again goes on from there.
    """

    dense: Path | None = None
    compressed: tuple[Path, ...] = ()
    baselines: tuple[Path, ...] = ()
    baseline_args: str = ""
    urls: tuple[str, ...] = ()
    baseline_urls: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    scenarios: tuple[Scenario, ...] = SCENARIOS
    repeats: int = 5
    scale: float = 1.0
    seed: int = 0
    serve_args: str = ""
    env: dict[str, str] = field(default_factory=dict)
    servers: str = "auto"
    quality: bool = True
    quality_text: Path | None = None
    log_dir: Path = Path("out/logs")
    keep: Path | None = None

    def check(self) -> None:
        """Raise :class:`UserError` for a comparison that cannot be made."""
        if bool(self.urls or self.baseline_urls) == bool(self.dense or self.compressed or self.baselines):
            raise UserError("give --dense DIR and --compressed DIR, or --dense-url and --compressed-url.")
        if (self.urls and len(self.urls) < 2) or (
            not self.urls and (self.dense is None or not self.compressed)
        ):
            raise UserError("a comparison needs a dense model and at least one compressed one.")
        if self.baseline_args and not self.baselines:
            raise UserError("--baseline-args is for the servers of --baseline DIR; give one.")
        if self.urls and (self.serve_args or self.env):
            raise UserError("--serve-args and --env are for servers that are started here; URLs name others.")
        if self.repeats < 1:
            raise UserError(
                f"--repeats is {self.repeats}; it must be at least 1 (3 or more for an interval)."
            )
        if self.servers not in ("auto", "both", "one"):
            raise UserError(f"--servers is {self.servers!r}; choose auto, both or one.")
        if not 0 < self.scale < math.inf:
            raise UserError(f"--scale is {self.scale}; it must be positive.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be at least 0.")
        check_api_key(self.api_key)

    def directories(self) -> list[Path]:
        """Directories of the dense model, the other baselines and the candidates, in that order."""
        return [] if self.dense is None else [self.dense, *self.baselines, *self.compressed]

    def own_flags(self) -> list[list[str]]:
        """Words for each directory's server alone."""
        own = split_words(self.baseline_args, "--baseline-args")
        return [own if role == "baseline" else [] for role in self.roles()] if self.dense else []

    def servers_up(self) -> list[str]:
        """Addresses in the same order."""
        return [*self.urls[:1], *self.baseline_urls, *self.urls[1:]]

    def roles(self) -> list[str]:
        """``dense``, ``baseline`` or ``compressed`` for each of them."""
        others = len(self.baselines) + len(self.baseline_urls)
        candidates = len(self.compressed) + max(0, len(self.urls) - 1)
        return ["dense", *["baseline"] * others, *["compressed"] * candidates]


def compare_models(config: CompareConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Run the whole comparison and return its report.

    Raises:
        UserError: The configuration is wrong, a server cannot be started or scored. Failed requests are
            counted in the report, and its ``ok`` is false.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all servers are stopped by then.
    """
    observer = observer or Observer()
    plan = prepare(config)
    models, scenarios, store = plan.models, plan.scenarios, plan.store
    observer.planned(plan.runs)
    fleet = Fleet(
        models,
        flags=plan.flags,
        env=config.env,
        together=plan.together,
        log_dir=config.log_dir,
        say=observer.say,
    )
    scores = store.scores() if config.quality else {}
    # Where everything has been measured already, no server is started.
    with fleet if plan.kept < plan.runs or scores is None else contextlib.nullcontext():
        if scores is None:
            scores = _quality(config, models, fleet, observer, plan.context)
            store.keep_scores(scores)
        reports = measure(
            fleet, models, scenarios, config.repeats, config.seed, observer, config.api_key, store
        )
    return _report(config, models, scenarios, reports, scores, plan.flags, plan.together)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison will do.

    Attributes:
        models: The contestants, the baseline first.
        scenarios: Load shapes, fitted to the context length.
        flags: For every ``vllm serve``.
        context: Context length that all servers have, where known.
        together: All servers are up at once, one running at a time.
        store: What has been measured already.
        runs: Load tests of the whole comparison.
        left: Scenarios that are still to be measured, one entry per repeat.
    """

    models: list[Contestant]
    scenarios: list[Scenario]
    flags: list[str]
    context: int | None
    together: bool
    store: Store
    runs: int
    left: list[Scenario]

    @property
    def kept(self) -> int:
        """Load tests that ``store`` has."""
        return self.runs - len(self.left) * len(self.models)


def prepare(config: CompareConfig) -> Plan:
    """Decide what is to be done; servers given by URL are asked what they serve.

    Raises:
        UserError: The configuration is wrong, or a server given by URL does not answer.
    """
    config.check()
    models = contestants(config.directories(), config.servers_up(), config.own_flags())
    flags = serve_flags(config.serve_args, config.directories()) if config.dense else []
    kv_space = _kv_cache_bytes(config.env)
    together = config.servers == "both" or (config.servers == "auto" and fits_in_memory(models, kv_space))
    identify(models, config.api_key)
    known = [context_limit(flags), *(model.context for model in models)]
    limit = min((length for length in known if length is not None), default=None)
    scenarios = [fit(scenario, limit, config.scale) for scenario in config.scenarios]
    together = together or not config.dense
    store = _open_store(config, models, flags, together)
    seeds = [config.seed + repeat for repeat in range(config.repeats)]
    left = store.left(_batches(scenarios, together), seeds)
    runs = len(scenarios) * len(models) * len(seeds)
    return Plan(models, scenarios, flags, limit, together, store, runs, left)


def _kv_cache_bytes(env: Mapping[str, str]) -> int:
    text = {**default_environment(), **env}["VLLM_CPU_KVCACHE_SPACE"]
    try:
        return int(float(text) * GIB)
    except (ValueError, OverflowError) as error:
        raise UserError(f"VLLM_CPU_KVCACHE_SPACE is {text!r}, not a number of GiB.") from error


def _read_text(path: Path | None) -> str | None:
    """The text of ``--quality-text``; None where the built-in one is used."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--quality-text {path}: not UTF-8 text ({error.reason}).") from error


def measure(
    fleet: Fleet,
    models: Sequence[Contestant],
    scenarios: Sequence[Scenario],
    repeats: int,
    seed: int,
    observer: Observer,
    api_key: str | None = None,
    store: Store | None = None,
) -> Reports:
    """Run every scenario on every contestant ``repeats`` times, in turns.

    With all servers up the turns are taken per scenario (A B, B A, A B, ...); else per repeat, because each
    turn then costs a start. The order changes from repeat to repeat, so that a steady drift of the
    machine favours nobody. Turns that ``store`` has are not measured again.
    """
    reports: Reports = {(s.name, m.name): [] for s in scenarios for m in models}

    def take_turns(batch: Sequence[Scenario], repeat: int) -> None:
        kept = None if store is None else store.turn(batch, seed + repeat)
        if kept is not None:
            for scenario in batch:
                for model in models:
                    reports[scenario.name, model.name].append(kept[scenario.name][model.name])
                    observer.measured(scenario, model, reports)
            return
        for model in models if repeat % 2 == 0 else reversed(models):
            with fleet.use(model):
                for scenario in batch:
                    one = _one_run(model, scenario, seed + repeat, api_key)
                    reports[scenario.name, model.name].append(one)
                    observer.measured(scenario, model, reports)
        newest = [reports[scenario.name, model.name][-1] for scenario in batch for model in models]
        # What failed is worth another try.
        if store is not None and all(is_complete(report) for report in newest):
            store.keep_turn(batch, seed + repeat, reports)

    for batch in _batches(scenarios, fleet.together):
        for repeat in range(repeats):
            take_turns(batch, repeat)
    return reports


def _batches(scenarios: Sequence[Scenario], together: bool) -> list[list[Scenario]]:
    """Scenarios that one turn measures."""
    return [[scenario] for scenario in scenarios] if together else [list(scenarios)]


def _open_store(
    config: CompareConfig, models: Sequence[Contestant], flags: Sequence[str], together: bool
) -> Store:
    """What ``config.keep`` holds of this very comparison."""
    settings = {
        "flags": list(flags),
        "env": {**default_environment(), **config.env},
        "together": together,
        "quality_text": _read_text(config.quality_text),
    }
    return Store(config.keep, settings, models)


def _one_run(model: Contestant, scenario: Scenario, seed: int, api_key: str | None) -> dict[str, Any]:
    vocabulary = None if model.files is None else vocabulary_size(model.files)
    config = scenario.run_config(model.url, model.served, seed=seed, vocab_size=vocabulary)
    result = run(replace(config, api_key=api_key))
    if result.load.interrupted:
        raise KeyboardInterrupt
    page = server_metrics.fetch(model.url)
    if page is not None:
        samples = server_metrics.parse(page)
        weights = server_metrics.plugin_weight_bytes(samples)
        model.facts |= {f"{kind}_bytes": value for kind, value in weights.items()}
        model.facts["kv_cache_tokens"] = server_metrics.kv_cache_tokens(samples)
    return result.report


def _quality(
    config: CompareConfig,
    models: Sequence[Contestant],
    fleet: Fleet,
    observer: Observer,
    context: int | None,
) -> dict[str, parity.Scores]:
    directory = models[0].files
    if directory is None:
        observer.say("no local model directory, so no text to compare answers on")
        return {}
    # The server generates one token after the prompt.
    length = parity.CONTEXT if context is None else min(parity.CONTEXT, context - 1)
    if (directory / "tokenizer.json").is_file() or config.quality_text is not None:
        prompts = parity.text_prompts(directory, _read_text(config.quality_text), context=length)
    else:
        prompts = parity.random_prompts(directory, context=length)
    scores: dict[str, parity.Scores] = {}
    for model in models:
        with fleet.use(model):
            observer.say(f"scoring {sum(map(len, prompts))} tokens with {model.name}")
            scores[model.name] = parity.score(model.url, model.served, prompts, api_key=config.api_key)
            model.facts["perplexity"] = parity.perplexity(scores[model.name])
    return scores


def _report(
    config: CompareConfig,
    models: Sequence[Contestant],
    scenarios: Sequence[Scenario],
    reports: Reports,
    scores: Mapping[str, parity.Scores],
    flags: Sequence[str],
    together: bool,
) -> dict[str, Any]:
    dense, *candidates = models
    entries = [
        {
            "candidate": candidate.name,
            "baseline": baseline.name,
            **scenario_entry(
                scenario, reports[scenario.name, baseline.name], reports[scenario.name, candidate.name]
            ),
        }
        for baseline, candidate in _pairs(models, config.roles())
        for scenario in scenarios
    ]
    distances = {
        candidate.name: parity.compare(scores[dense.name], scores[candidate.name]).as_json()
        | {
            "perplexity_dense": parity.perplexity(scores[dense.name]),
            "perplexity_compressed": parity.perplexity(scores[candidate.name]),
        }
        for candidate in candidates
        if candidate.name in scores
    }
    first = distances.get(
        next(m.name for m, r in zip(models, config.roles(), strict=True) if r == "compressed")
    )
    return {
        "schema": SCHEMA,
        "config": {
            "repeats": config.repeats,
            "seed": config.seed,
            "scale": config.scale,
            "serve_flags": environment.masked_words(flags),
            "baseline_flags": environment.masked_words(split_words(config.baseline_args, "--baseline-args")),
            "env": environment.masked(config.env),
            "servers": _servers_in_words(config, together),
            "quality_text": None if config.quality_text is None else str(config.quality_text),
        },
        "environment": {**environment.describe(), "command": environment.command_line()},
        "models": [_model_entry(model, role) for model, role in zip(models, config.roles(), strict=True)],
        "scenarios": entries,
        "parity": {**(first or {}), "by_candidate": distances},
        "ok": not any(entry["failed"] for entry in entries),
    }


def _servers_in_words(config: CompareConfig, together: bool) -> str:
    if config.dense is None:
        return "started by others"
    return "both up, one running at a time" if together else "one at a time"


def _pairs(models: Sequence[Contestant], roles: Sequence[str]) -> list[tuple[Contestant, Contestant]]:
    """Who is compared with whom: the candidates with the dense model, then all else."""
    of_role = {
        role: [m for m, r in zip(models, roles, strict=True) if r == role] for role in (*roles, "baseline")
    }
    dense, others, candidates = models[0], of_role["baseline"], of_role["compressed"]
    pairs = [(dense, candidate) for candidate in candidates]
    pairs += [(baseline, candidate) for baseline in others for candidate in candidates]
    return pairs + [(dense, baseline) for baseline in others]


def _model_entry(model: Contestant, role: str) -> dict[str, Any]:
    directory = None if model.directory is None else str(model.directory)
    return {"name": model.name, "role": role, "directory": directory, "url": model.url, **model.facts}
