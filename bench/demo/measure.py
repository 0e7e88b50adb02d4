"""Serves the demo's models with real vLLM and asks them over the OpenAI API: parity, perplexity, load.

Everything here is served in float32, where a compressed model has to agree with its dense twin almost to
the bit; speed is measured elsewhere, at a real size and in bf16.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import parity
from bench.demo.models import DemoModel, DemoModels, heldout_windows
from bench.demo.steps import Steps
from bench.runner import RunConfig, run
from bench.server import Server
from bench.workloads import WorkloadSpec

FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16")
# A twin is only compared, so it answers fewer windows; still over the 4,000 positions a parity needs.
TWIN_WINDOWS = 12
LOAD = WorkloadSpec(dataset="random", num_requests=16, input_len=128, output_len=32, ignore_eos=True, seed=1)
CONCURRENCY = 4
MAX_MEAN_DLOGPROB, MIN_TOP1_AGREEMENT = 1e-4, 0.999


@dataclass(frozen=True)
class Measured:
    """One model as it was served.

    Attributes:
        model: which.
        served_perplexity: from the API's prompt logprobs, on the trainer's tokens.
        parity: against its dense twin; None for the dense model.
        metrics: of one load test, as in ``bench-run/1``.
        weight_bytes: of its checkpoint.
    """

    model: DemoModel
    served_perplexity: float
    parity: parity.Parity | None
    metrics: dict[str, Any]
    weight_bytes: int

    @property
    def parity_ok(self) -> bool:
        """Whether the served model answers as its twin does."""
        if self.parity is None:
            return True
        close = self.parity.mean_dlogprob <= MAX_MEAN_DLOGPROB
        return close and self.parity.top1_agreement >= MIN_TOP1_AGREEMENT

    @property
    def perplexity_ok(self) -> bool:
        """Whether serving changed the perplexity by no more than half a percent."""
        return abs(self.served_perplexity / self.model.perplexity - 1) <= 0.005

    def as_json(self, unigram: float | None) -> dict[str, Any]:
        """One entry of the report's ``models``."""
        compared = {"mean_dlogprob": 0.0, "top1_agreement": 1.0, "positions": 0}
        if self.parity is not None:
            compared = {
                "mean_dlogprob": self.parity.mean_dlogprob,
                "top1_agreement": self.parity.top1_agreement,
                "positions": self.parity.positions,
            }
        return {
            "name": self.model.name,
            "kind": self.model.kind,
            "detail": self.model.detail,
            "perplexity": self.served_perplexity,
            "perplexity_trainer": self.model.perplexity,
            "perplexity_unigram": unigram,
            "weight_bytes": self.weight_bytes,
            "parity": {"ok": self.parity_ok and self.perplexity_ok, **compared},
            "metrics": self.metrics,
        }


def serve_and_measure(models: DemoModels, out: Path, steps: Steps) -> list[Measured]:
    """Start all servers, compare answers, load each in turn while the others are paused."""
    windows = heldout_windows(models.dense.directory)
    with ExitStack() as stack:
        servers = _servers(models.models, out / "logs")
        with steps.step(f"start {len(servers)} vLLM servers (float32)"):
            _start(servers, stack)
        with steps.step(f"score {len(windows)} held-out windows through the API"):
            scores = {
                directory: parity.score(server.base_url, server.name, _asked(windows, directory, models))
                for directory, server in servers.items()
            }
        with steps.step("load each server, the others paused"):
            loads = _load_in_turn([servers[model.directory] for model in models.models], servers)
    return [
        Measured(
            model,
            parity.perplexity(scores[model.directory]),
            parity.compare(_first(scores[model.directory], TWIN_WINDOWS), scores[model.twin])
            if model.twin
            else None,
            load,
            weight_bytes(model.directory),
        )
        for model, load in zip(models.models, loads, strict=True)
    ]


def _servers(models: Sequence[DemoModel], logs: Path) -> dict[Path, Server]:
    directories = [path for model in models for path in (model.directory, model.twin) if path is not None]
    return {path: Server(path, flags=FLAGS, log_path=logs / f"{path.name}.log") for path in directories}


def _start(servers: dict[Path, Server], stack: ExitStack) -> None:
    """Start two at a time: one alone leaves a core idle."""
    waiting = list(servers.values())
    for pair in zip(waiting[::2], [*waiting[1::2], None], strict=False):
        started = [server for server in pair if server is not None]
        for server in started:
            stack.callback(server.stop)
            server.launch()
        for server in started:
            server.wait()


def _asked(windows: list[list[int]], directory: Path, models: DemoModels) -> list[list[int]]:
    is_twin = any(directory == model.twin for model in models.models)
    return windows[:TWIN_WINDOWS] if is_twin else windows


def _first(scores: parity.Scores, prompts: int) -> parity.Scores:
    """The scores of the first ``prompts`` prompts."""
    positions = int(scores.lengths[:prompts].sum())
    return parity.Scores(
        scores.logprobs[:positions],
        scores.top1[:positions],
        scores.lengths[:prompts],
        scores.tokens[:positions],
    )


def _load_in_turn(measured: list[Server], servers: dict[Path, Server]) -> list[dict[str, Any]]:
    for server in servers.values():
        server.pause()
    results = []
    for server in measured:
        server.resume()
        config = RunConfig(server.base_url, model=server.name, workload=LOAD, concurrency=CONCURRENCY)
        results.append(run(config).report["metrics"])
        server.pause()
    return results


def weight_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's safetensors files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
