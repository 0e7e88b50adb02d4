"""2:4 served by vLLM against llama.cpp at the same weight precision, in turns."""

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from bench.report import interval
from bench.rivals.serving import FLAGS, SCENARIOS
from bench.runner import run
from bench.scenarios import Scenario
from bench.server import Server
from bench.statistics import paired_ratio
from bench.tokenizer import vocabulary_size
from vllm_sparse.errors import UserError

WORKER = Path(__file__).with_name("llama_worker.py")
# What is compared -> llama.cpp's weights and the 2:4 checkpoint of the same precision. llama.cpp rounds the
# activations of quantised weights to 8 bits, which of the int4 checkpoints only 2of4-w4a8 does.
PAIRS = {
    "bf16": ("bf16", "2of4-bf16"),
    "q8_0": ("q8_0", "2of4-int8"),
    "q4_0": ("q4_0", "2of4-int4"),
    "q4_0-w4a8": ("q4_0", "2of4-w4a8"),
}


@dataclass(frozen=True)
class Rival:
    """How llama.cpp runs.

    Attributes:
        python: interpreter with llama-cpp-python.
        threads: its threads; vLLM takes the cores it is bound to.
    """

    python: str
    threads: int


def write_gguf(python: str, folder: Path, kind: str) -> Path:
    """The GGUF twin of ``folder / "bf16"`` with weights of type ``kind``; an existing one is kept.

    Raises:
        UserError: the interpreter lacks gguf or numpy.
    """
    target = folder / f"{kind}.gguf"
    if not target.exists():
        command = [python, str(WORKER), "write", str(folder / "bf16"), str(target), kind]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise UserError(
                f"{python} could not write {target}: {result.stderr.strip().splitlines()[-1]}. It needs the "
                "packages gguf, numpy and llama-cpp-python."
            )
    return target


class LlamaCpp:
    """A llama.cpp process that measures on request."""

    def __init__(self, rival: Rival, model: Path) -> None:
        command = [rival.python, str(WORKER), "serve", str(model), str(rival.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> "LlamaCpp":
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        line = self._answers.readline()
        if not line:
            raise UserError(f"llama.cpp ended with code {self._process.wait()}; its messages are above")
        return line

    def measure(self, scenario: Scenario) -> dict[str, Any]:
        """Times of one scenario in milliseconds: ``prefill_ms`` per prompt, ``step_ms`` per decode step."""
        request = {
            "batch": scenario.concurrency,
            "prompt": scenario.input_len,
            "tokens": scenario.output_len,
        }
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        found: dict[str, Any] = json.loads(self._read())
        return found


def _llama_ms(scenario: Scenario, times: dict[str, Any]) -> float:
    if scenario.headline == "ttft_ms":
        return float(median(times["prefill_ms"]))
    # The first step of a new batch size allocates.
    return float(median(times["step_ms"][1:]))


def compare(
    folder: Path, kind: str, rival: Rival, repeats: int, serve_args: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Times of both and ``llama.cpp / 2:4`` ratios, above 1 where 2:4 is faster.

    Args:
        folder: checkpoints as :func:`bench.rivals.checkpoints.write_set` leaves them.
        kind: of :data:`PAIRS`.
        rival: how llama.cpp runs.
        repeats: paired turns.
        serve_args: further words for ``vllm serve``.
        say: called with what is going on.
    """
    weights, sparse = PAIRS[kind]
    model = write_gguf(rival.python, folder, weights)
    directory = folder / sparse
    flags = shlex.split(f"{FLAGS} {serve_args}")
    vocabulary = vocabulary_size(directory)
    values: dict[str, tuple[list[float], list[float]]] = {s.name: ([], []) for s in SCENARIOS}
    say(f"starting {directory.name} and {model.name}")
    server = Server(directory, flags=flags, log_path=folder / "logs" / f"{directory.name}-{kind}.log")
    with server, LlamaCpp(rival, model) as other:
        server.pause()
        for repeat in range(repeats):
            for scenario in SCENARIOS:
                values[scenario.name][0].append(_llama_ms(scenario, other.measure(scenario)))
                server.resume()
                config = scenario.run_config(server.base_url, server.name, seed=repeat, vocab_size=vocabulary)
                metrics = run(config).report["metrics"]
                server.pause()
                values[scenario.name][1].append(metrics[scenario.headline]["p50"])
        server.resume()
    return {
        "kind": kind,
        "scenarios": [
            {
                "name": s.name,
                "title": s.title,
                "llama_cpp_ms": values[s.name][0],
                "vllm_ms": values[s.name][1],
                "ratio": {
                    **paired_ratio(*values[s.name], lower_is_better=True).as_json(),
                    "pairs": len(values[s.name][0]),
                },
            }
            for s in SCENARIOS
        ],
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Every scenario as text."""
    weights, sparse = PAIRS[report["kind"]]
    for entry in report["scenarios"]:
        yield (
            f"{entry['title']:<24} llama.cpp {weights} {median(entry['llama_cpp_ms']):.1f} ms, "
            f"{sparse} {median(entry['vllm_ms']):.1f} ms; "
            f"{entry['ratio']['value']:.2f}x, 95 % interval {interval(entry['ratio'])}"
        )
