"""What a load test would send, and about how long that would take: ``bench run --dry-run``."""

import math
from dataclasses import dataclass, replace

from bench import estimate, probe
from bench.client import Request, normalise_base_url
from bench.records import NANOSECONDS
from bench.runner import RunConfig, due_offsets, likely_problems, make_workloads
from bench.workloads import Workload

_NOTHING_KNOWN = probe.ServerFacts(models=[], roots={}, max_model_len=None, version=None)
_CHARACTERS_PER_TOKEN = 4
"""Of English text in usual vocabularies; only the server counts exactly."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A load test that has not been run.

    Attributes:
        load: The load model, in words.
        server: What is known of the server, in words.
        requests: Measured requests.
        conversations: Conversations these are turns of; None for single requests.
        warmups: Requests sent before.
        prompt_tokens: Mean length of a prompt with its history; exact for prompts sent as token ids.
        output_tokens: Tokens asked for in all.
        expected: How long it will take, in words.
        warnings: What is likely to go wrong.
    """

    load: str
    server: str
    requests: int
    conversations: int | None
    warmups: int
    prompt_tokens: float
    output_tokens: int
    expected: str
    warnings: list[str]

    def lines(self) -> list[str]:
        """For the terminal."""
        what = f"{self.requests} requests"
        if self.conversations is not None:
            what += f", turns of {self.conversations} conversations"
        before = f", after {self.warmups} for warming up" if self.warmups else ""
        return [
            self.server,
            f"{self.load}: {what}{before}",
            f"prompts of {self.prompt_tokens:.0f} tokens (mean), {self.output_tokens} tokens to generate",
            *(f"warning: {warning}" for warning in self.warnings),
            f"expected: {self.expected}",
        ]


def plan(config: RunConfig) -> RunPlan:
    """Make the workload and its schedule, and estimate the time.

    A closed loop's time depends on the server, so that one is asked by one short request; an open loop's does
    not, as long as the server keeps up.

    Raises:
        UserError: The configuration cannot be run.
    """
    config.check()
    base_url = normalise_base_url(config.base_url)
    config = replace(config, base_url=base_url)
    facts = _ask(config)
    if facts is not None:
        config = replace(config, model=probe.choose_model(facts, config.model))
    workload, warmups = make_workloads(config, facts or _NOTHING_KNOWN)
    last = max(due_offsets(config, workload) or [0]) / NANOSECONDS
    groups = workload.conversations
    return RunPlan(
        load=_load_in_words(config),
        server=_server_in_words(config, facts),
        requests=len(workload.requests),
        conversations=None if groups is None else len(groups),
        warmups=len(warmups),
        prompt_tokens=_mean_prompt(config, workload),
        output_tokens=sum(request.output_len for request in workload.requests),
        expected=_expected(config, workload, len(warmups), last, reachable=facts is not None),
        warnings=[] if facts is None else likely_problems(config, facts, workload),
    )


def _ask(config: RunConfig) -> probe.ServerFacts | None:
    try:
        return probe.ask(config.base_url, config.api_key)
    except probe.UnreachableError:
        return None


def _server_in_words(config: RunConfig, facts: probe.ServerFacts | None) -> str:
    if facts is None:
        return f"{config.base_url}, which does not answer"
    limit = "" if facts.max_model_len is None else f", {facts.max_model_len} tokens of context"
    return f"{config.base_url}, model {config.model}{limit}"


def _load_in_words(config: RunConfig) -> str:
    users = config.concurrency or 1
    if config.load_model == "closed":
        return f"closed loop, {users} user{'' if users == 1 else 's'}"
    if config.load_model == "trace":
        return f"replay of {config.workload.path}"
    rate = config.request_rate or 0.0
    if math.isinf(rate):
        words = "open loop, all at once"
    elif config.ramp_from is not None:
        words = f"open loop, from {config.ramp_from:g} to {rate:g} requests/s"
    else:
        gaps = {1.0: "Poisson", math.inf: "constant"}.get(config.burstiness, f"gamma {config.burstiness:g}")
        words = f"open loop, {rate:g} requests/s ({gaps})"
    return words if config.concurrency is None else f"{words}, at most {users} in flight"


def _length(request: Request, config: RunConfig) -> int:
    """Tokens of a prompt without its history, where it is text: about."""
    if isinstance(request.prompt, list):
        return len(request.prompt)
    spec = config.workload
    if spec.dataset == "sharegpt":
        return -(-len(request.prompt) // _CHARACTERS_PER_TOKEN)
    return spec.input_len + (spec.prefix_len if spec.dataset == "prefix" else 0)


def _mean_prompt(config: RunConfig, workload: Workload) -> float:
    total, history = 0, 0
    for request in workload.requests:
        history = 0 if request.turn == 0 else history
        history += _length(request, config)
        total += history
        history += request.output_len
    return total / len(workload.requests)


def _expected(config: RunConfig, workload: Workload, warmups: int, last: float, *, reachable: bool) -> str:
    """The estimate in words; ``last`` is when the last request is due, in seconds."""
    scheduled = config.load_model != "closed" and last > 0
    if scheduled and config.load_model != "capped":
        cut = "" if config.max_seconds is None else f", cut off after {config.max_seconds:g} s"
        return f"at least {estimate.in_words(last)}, more where the server cannot keep up{cut}"
    speed = estimate.of_server(config.base_url, config.api_key, config.model) if reachable else None
    if speed is None:
        return f"unknown, {config.base_url} does not answer"
    count, length = len(workload.requests), round(_mean_prompt(config, workload))
    output = round(sum(request.output_len for request in workload.requests) / count)
    users = config.concurrency or (1 if config.load_model == "closed" else count)
    seconds = max(last, speed.seconds(count, users, length, output))
    groups = workload.conversations
    if groups is not None:
        pauses = (count - len(groups)) / len(groups)
        seconds += math.ceil(len(groups) / users) * pauses * config.workload.think_time_s
    if config.max_seconds is not None:
        seconds = min(seconds, config.max_seconds)
    if warmups:
        # The first one alone, then the others together.
        seconds += speed.seconds(1, 1, length, output)
        seconds += speed.seconds(warmups - 1, warmups - 1, length, output) if warmups > 1 else 0.0
    return f"about {estimate.in_words(seconds)}, by one short request"
