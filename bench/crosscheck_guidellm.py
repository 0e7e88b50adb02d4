"""guidellm as a second opinion: its command with an equal load, and its report in our definitions.

guidellm 0.8 keeps the times of every request. Its summaries differ from vLLM's by definition: percentiles are
values that occurred, not interpolated; its "TPOT" counts the time to the first token, too (its "ITL" is what
others call TPOT); throughput is a mean over events. From the single requests the usual figures can be had, so
that only what was measured differs, not how it is summed up.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vllm_sparse.errors import FormatError, UserError


@dataclass(frozen=True, slots=True)
class Times:
    """What is taken from a report: seconds of the run; of every request TTFT and E2E in ms, and tokens."""

    seconds: float
    ttft: np.ndarray
    e2e: np.ndarray
    tokens: np.ndarray


def guidellm_command(
    program: str,
    base_url: str,
    model: str,
    tokenizer: Path,
    *,
    prompts: Path,
    concurrency: int,
    num_requests: int,
    report: Path,
) -> list[str]:
    """A closed loop of ``concurrency`` users over ``prompts``; it asks for ``ignore_eos`` by itself."""
    backend = {
        "kind": "openai_http",
        "target": base_url,
        "model": model,
        "request_format": "/v1/completions",
        # Without them it samples at the server's temperature and asks for running token counts.
        "extras": {"body": {"temperature": 0, "stream_options": {"include_usage": True}}},
    }
    options = {
        "--backend": json.dumps(backend),
        "--profile": f"kind=concurrent,streams={concurrency}",
        "--constraint": f"kind=max_requests,count={num_requests}",
        "--tokenizer": f"kind=hf_auto,model={tokenizer}",
        "--data": f"kind=json_file,path={prompts}",
        "--output": f"kind=json,path={report}",
    }
    words = [word for pair in options.items() for word in pair]
    return [program, "run", *words, "--disable-console"]


def read_guidellm(path: Path, num_requests: int) -> Times:
    """The requests of a guidellm report.

    Raises:
        FormatError: The file is not such a report.
        UserError: Not all requests were completed.
    """
    try:
        requests = orjson.loads(path.read_bytes())["benchmarks"][0]["requests"]["successful"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise FormatError(f"{path}: not a report of guidellm 0.8 ({error!r}).") from error
    if len(requests) != num_requests:
        raise UserError(f"guidellm completed {len(requests)} of {num_requests} requests.")
    ttft = _column(requests, "time_to_first_token_ms")
    tpot = _column(requests, "inter_token_latency_ms")
    tokens = _column(requests, "output_tokens")
    start = min(request["request_start_time"] for request in requests)
    seconds = max(request["request_end_time"] for request in requests) - start
    # Sent to last token; its own request latency ends when the connection is done.
    return Times(seconds, ttft, ttft + tpot * (tokens - 1), tokens)


def _column(requests: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.asarray([request[name] for request in requests], dtype=np.float64)
