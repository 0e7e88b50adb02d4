"""The load shapes of a comparison: decode and prefill are different products, so they are measured apart."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import UserError

if TYPE_CHECKING:
    from bench.runner import RunConfig


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load shape.

    Attributes:
        name: Short name used in reports and on the command line.
        title: What it stands for.
        headline: The metric this scenario is about.
        input_len: Prompt tokens.
        output_len: Generated tokens, always exactly (``ignore_eos``).
        num_requests: Requests per repeat.
        concurrency: Closed loop with that many users; None sends everything at once.
        range_ratio: Lengths vary by ± that share.
    """

    name: str
    title: str
    headline: str
    input_len: int
    output_len: int
    num_requests: int
    concurrency: int | None
    range_ratio: float = 0.0

    def run_config(
        self, base_url: str, model: str, *, seed: int, vocab_size: int | None = None
    ) -> "RunConfig":
        """The load test of one repeat; equal seeds give equal prompts to every model."""
        from bench.runner import RunConfig
        from bench.workloads import WorkloadSpec

        spec = WorkloadSpec(
            num_requests=self.num_requests,
            input_len=self.input_len,
            output_len=self.output_len,
            range_ratio=self.range_ratio,
            ignore_eos=True,
            seed=seed,
        )
        return RunConfig(
            base_url=base_url,
            model=model,
            workload=spec,
            concurrency=self.concurrency,
            request_rate=None if self.concurrency is not None else math.inf,
            vocab_size=vocab_size,
            workers=1,
        )

    def as_json(self) -> dict[str, Any]:
        """Settings for the report."""
        return asdict(self)


SCENARIOS = (
    Scenario("decode-1", "decode-bound, batch 1", "tpot_ms", 32, 64, 4, 1),
    Scenario("decode-8", "decode-bound, batch 8", "tpot_ms", 32, 64, 16, 8),
    Scenario("prefill", "prefill-bound", "ttft_ms", 512, 1, 8, 1),
    Scenario("mixed", "mixed lengths, 4 users", "output_tokens_per_s", 192, 48, 16, 4, 0.5),
    Scenario("saturation", "everything at once", "output_tokens_per_s", 128, 32, 32, None),
)


def choose(names: Sequence[str]) -> list[Scenario]:
    """Scenarios by name, all of them when none is named."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--scenario {unknown[0]!r} is not known; choose of {', '.join(known)}.")
    return [known[name] for name in names] if names else list(SCENARIOS)


def fit(scenario: Scenario, max_model_len: int | None, scale: float = 1.0) -> Scenario:
    """Adapt a scenario: shorter prompts for a short context, fewer or more requests by ``scale``."""
    requests = max(scenario.concurrency or 1, round(scenario.num_requests * scale))
    scenario = replace(scenario, num_requests=requests)
    if max_model_len is None:
        return scenario
    # Random prompts sent as ids need no slack; the last generated token is not stored.
    room = math.floor(max_model_len / (1 + scenario.range_ratio))
    output_len = min(scenario.output_len, max(1, room // 2))
    input_len = min(scenario.input_len, room - output_len)
    if input_len < 1:
        raise UserError(f"a context of {max_model_len} tokens is too short for scenario {scenario.name}.")
    return replace(scenario, input_len=input_len, output_len=output_len)
