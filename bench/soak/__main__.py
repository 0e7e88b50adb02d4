"""``python -m bench.soak``: a compressed model under mixed load, watched; see docs/reliability.md."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.soak.model import small_24_model
from bench.soak.run import SoakConfig, run
from bench.soak.verdict import Limits
from converters.train.threads import wait_passively
from vllm_sparse.errors import UserError


def main(
    model: Annotated[
        Path | None, typer.Option(help="Compressed checkpoint with a tokenizer; one is made without it.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes of load, warm-up included.")] = 60.0,
    users: Annotated[int, typer.Option(help="Most requests in flight.")] = 4,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second in all; without it users never pause.")
    ] = None,
    max_len: Annotated[int, typer.Option(help="Context length of the server.")] = 512,
    serve_args: Annotated[str, typer.Option(help="Further words for `vllm serve`.")] = "--enforce-eager",
    growth_percent: Annotated[float, typer.Option(help="Growth of RSS that still counts as flat.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Where the model and the report go.")] = Path("out/soak"),
    seed: Annotated[int, typer.Option(help="Seed of the load.")] = 0,
) -> None:
    """Serve a compressed model under mixed load; exit 1 on a failed request, a leak, or a lost stream.

    Example: python -m bench.soak --minutes 5
    """
    wait_passively()
    console = Console(highlight=False, width=110)
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)

    if model is None:
        say("making a small 2:4 model")
        model = small_24_model(out / "model")
    config = SoakConfig(
        model=model,
        minutes=minutes,
        users=users,
        rate=rate,
        max_len=max_len,
        serve_args=tuple(shlex.split(serve_args)),
        seed=seed,
        limits=Limits(growth_percent=growth_percent),
    )
    report = run(config, out / "soak.json", say)
    for line in summary(report):
        console.print(line, markup=False)
    console.print(f"written: {out / 'soak.json'}", markup=False)
    if not report["ok"]:
        sys.exit(1)


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    requests, memory, fds, drained = (report[name] for name in ("requests", "memory", "fds", "drain"))
    lines = [
        f"requests  {requests['sent']} sent, {requests['completed']} completed, {requests['failed']} failed, "
        f"{requests['hung_up']} cut off by the client; {requests['output_tokens']} tokens"
    ]
    if report["server_cores_busy"] is not None:
        lines.append(f"load      the server kept {report['server_cores_busy']} cores busy")
    if report["suspended_s"]:
        lines.append(f"suspended {report['suspended_s']} s of the time")
    if memory["ok"] is None:
        lines.append(f"memory    {memory['reason']}")
    else:
        lines.append(
            f"memory    RSS {memory['first_quarter_mib']} -> {memory['last_quarter_mib']} MiB "
            f"({memory['growth_percent']:+.2f} %, limit {memory['limit_percent']} %), "
            f"slope {memory['slope_mib_per_hour']:+.2f} MiB/h"
        )
    lines.append(
        f"at rest   descriptors {fds['after_warmup']} -> {fds['at_end']}, "
        f"threads {fds['threads_after_warmup']} -> {fds['threads_at_end']}"
    )
    lines.append(
        f"SIGTERM   {drained['with_all_tokens']} of {drained['in_flight']} streams in flight came whole, "
        f"exit code {drained['exit_code']} after {drained['seconds']} s, "
        f"{len(drained['left_behind'])} processes left"
    )
    lines += [f"failure   {detail}" for detail in requests["failures"] + drained["failures"]]
    lines += [f"log       {line}" for line in report["log_errors"] or []]
    if report["log_errors_after_stop"]:
        lines.append("log       vLLM called the engine dead after it had been stopped as asked; not counted")
    return [*lines, "ok" if report["ok"] else "NOT ok"]


def entry() -> int:
    """Run with user errors as one sentence and exit code 2."""
    try:
        typer.run(main)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror or error}: {error.filename or ''}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the server is stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(entry())
