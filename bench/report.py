"""HTML pages of reports: ``render(report)`` chooses by the report's schema.

:func:`ratio_sections` and :func:`distribution_section` are also used for pages that hold a comparison among
other things.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.page import (
    Chart,
    Note,
    Page,
    Row,
    Section,
    Table,
    Tile,
    command_section,
    environment_section,
    facts_table,
    megabytes,
    number,
)
from bench.statistics import FEWEST_TO_SHOW
from bench.svg import (
    RatioRow,
    Series,
    Span,
    distribution,
    legend,
    line_chart,
    ratio_chart,
    timeline,
)
from vllm_sparse.errors import FormatError

LATENCIES = {
    "ttft_ms": "TTFT",
    "ttft_from_schedule_ms": "TTFT from schedule",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2e_ms": "E2E",
    "e2e_from_schedule_ms": "E2E from schedule",
}
METRIC_NAMES = {
    **LATENCIES,
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "requests_per_s": "requests/s",
}
TABLE_ONLY = ("total_tokens_per_s", "requests_per_s")
"""With equal lengths these ratios follow from the output rate; charts leave them out."""
_COLUMNS = ("mean", "std", "p50", "p90", "p95", "p99", "max")
DEFINITIONS = (
    "TTFT: sent to first token. TPOT: (E2E - TTFT) / (output tokens - 1). ITL: gap between tokens, or "
    "between chunks where the server sends no running count. “From schedule” starts the clock when the "
    "request was due, not when it was sent. Failed requests are in no figure. ? marks "
    "percentiles that too few requests cannot resolve."
)


def render(report: Mapping[str, Any]) -> str:
    """The page of a ``bench-run``, ``bench-compare`` or ``bench-sweep`` report.

    Raises:
        FormatError: There is no page for this schema.
    """
    from bench.sweep_report import sweep_page

    pages: dict[str, Callable[[Mapping[str, Any]], Page]] = {
        "vllm-sparse/bench-run/1": run_page,
        "vllm-sparse/bench-compare/1": compare_page,
        "vllm-sparse/bench-sweep/1": sweep_page,
    }
    schema = report.get("schema")
    if schema not in pages:
        raise FormatError(f"schema is {schema!r}; pages exist for {', '.join(pages)}.")
    return pages[schema](report).render()


def run_page(report: Mapping[str, Any]) -> Page:
    """Page of one load test."""
    config, metrics, requests = report["config"], report["metrics"], report["requests"]
    sections = [latency_section(metrics, config["load_model"])]
    if report.get("turns"):
        sections.append(turns_section(report["turns"]))
    if report.get("raw"):
        sections += [_run_distributions(report), _timeline_section(report["raw"])]
    sections.append(_throughput_section(report))
    if report.get("server_metrics"):
        sections.append(_server_section(report))
    sections.append(
        Section(
            "Configuration",
            table=facts_table({k: v for k, v in config.items() if not (isinstance(v, float) and v == 0)}),
        )
    )
    sections.append(environment_section(report["environment"]))
    sections.append(command_section([report["environment"]["command"]]))
    return Page(
        title=f"Load test of {config['model']}",
        subtitle=f"{describe_load(config)}; {config['dataset']} prompts, {requests['completed']} of "
        f"{requests['planned']} requests completed in {metrics['duration_s']:.1f} s",
        tiles=_run_tiles(metrics, requests),
        notes=_run_notes(report),
        sections=sections,
    )


def describe_load(config: Mapping[str, Any]) -> str:
    """The load model in words."""
    rate, users = config["request_rate"], config["concurrency"]
    everything = (
        "everything at once" if rate == "inf" else f"{rate} requests/s, burstiness {config['burstiness']}"
    )
    return {
        "closed": f"closed loop, {users} at a time",
        "open": f"open loop, {everything}",
        "capped": f"{everything}, at most {users} in flight",
        "trace": "trace replay",
    }[str(config["load_model"])]


def _run_tiles(metrics: Mapping[str, Any], requests: Mapping[str, int]) -> list[Tile]:
    tiles = [
        Tile("Output", f"{metrics['output_tokens_per_s']:.1f}", "tokens/s"),
        Tile("Requests", f"{metrics['requests_per_s']:.3g}", "per second"),
    ]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        if metrics[name]["n"]:
            detail = f"ms median, {number(metrics[name]['p95'], 1)} p95"
            tiles.append(Tile(LATENCIES[name], number(metrics[name]["p50"], 1), detail))
    if metrics["goodput_rps"] is not None:
        tiles.append(Tile("Goodput", f"{metrics['goodput_rps']:.3g}", "requests/s within limits"))
    lost = requests["planned"] - requests["completed"]
    tiles.append(Tile("Not completed", str(lost), f"of {requests['planned']}", "bad" if lost else ""))
    return tiles


def _run_notes(report: Mapping[str, Any]) -> list[Note]:
    notes = [Note("Not valid:", reason, "bad") for reason in report["validity"]["reasons"]]
    for failure in report["failures"]:
        status = f" {failure['status']}" if failure["status"] else ""
        notes.append(
            Note(f"{failure['count']} failed ({failure['kind']}{status}):", failure["example"], "bad")
        )
    if report.get("interrupted"):
        notes.append(Note("Interrupted:", "the run was ended before it was complete.", "bad"))
    return notes + [Note("Note:", text) for text in report.get("warnings", [])]


def latency_section(metrics: Mapping[str, Any], load_model: str) -> Section:
    """Table of all latencies."""
    rows = []
    for name, label in LATENCIES.items():
        values = metrics[name]
        if not values["n"] or (load_model == "closed" and "schedule" in name):
            continue
        if name == "itl_ms" and metrics["itl_basis"] == "chunk":
            label = "inter-chunk"
        cells = [
            number(values[column]) + ("?" if column in values["unresolved"] else "") for column in _COLUMNS
        ]
        rows.append(Row([label, *cells, str(values["n"])]))
    return Section("Latency in milliseconds", table=Table(["", *_COLUMNS, "n"], rows), foot=DEFINITIONS)


def turns_section(turns: Sequence[Mapping[str, Any]]) -> Section:
    """Conversations: what each further turn, with its longer history, costs."""
    names = ("ttft_ms", "tpot_ms", "e2e_ms")
    rows = []
    for turn in turns:
        figures = [number(turn["prompt_tokens"], 0), *(number(turn[name]) for name in names)]
        rows.append(Row([str(turn["turn"]), *figures, str(turn["n"])]))
    charts = []
    for position, name in enumerate(("ttft_ms", "e2e_ms"), start=1):
        points = [
            (turn["prompt_tokens"], turn[name])
            for turn in turns
            if turn["prompt_tokens"] is not None and turn[name] is not None
        ]
        series = [Series(LATENCIES[name], points, f"s{position}", markers=True)]
        caption = f"{LATENCIES[name]} against the length of the history"
        chart = line_chart(
            series, title=caption, x_label="prompt tokens, mean of a turn", y_label="ms, median"
        )
        charts.append(Chart(chart, caption))
    head = ["turn", "prompt tokens", *(f"{LATENCIES[name]} p50" for name in names), "n"]
    foot = "Prompts grow by what was said before; a server with a prefix cache knows that part already."
    return Section("By turn of the conversation", table=Table(head, rows), charts=charts, foot=foot)


def _run_distributions(report: Mapping[str, Any]) -> Section:
    raw = report["raw"]

    def since(start: str, moment: str, factor: float = 1.0) -> list[float]:
        rows = zip(raw[start], raw[moment], raw["outcome"], strict=True)
        return [
            factor * (b - a) for a, b, how in rows if how == "completed" and a is not None and b is not None
        ]

    charts = []
    for label, moment in (("Time to first token", "first_token_ms"), ("End to end", "last_token_ms")):
        series = [distribution(since("dispatched_ms", moment), "from sending", "s1")]
        if report["config"]["load_model"] != "closed":
            series.append(distribution(since("scheduled_ms", moment), "from schedule", "s2", dashed=True))
        chart = line_chart(
            series, title=label, x_label="milliseconds", y_label="% of requests", y_range=(0, 100)
        )
        charts.append(Chart(chart, label, legend(series)))
    return Section("Distribution of latencies", charts=charts)


def _timeline_section(raw: Mapping[str, Any]) -> Section:
    spans = [
        Span(*moments[:4], failed=moments[4] != "completed")
        for moments in zip(
            raw["scheduled_ms"],
            raw["dispatched_ms"],
            raw["first_token_ms"],
            raw["finished_ms"],
            raw["outcome"],
            strict=True,
        )
    ]
    keys = (("wait", "waiting in the client"), ("prefill", "to the first token"), ("decode", "generating"))
    items = [f'<span class="key {style}">{text}</span>' for style, text in (*keys, ("failed", "failed"))]
    chart = timeline(spans, title="Timeline of all requests")
    return Section(
        "Timeline", charts=[Chart(chart, legend=f'<p class="legend">{"".join(items)}</p>')], wide=True
    )


def _throughput_section(report: Mapping[str, Any]) -> Section:
    metrics, steady = report["metrics"], report["metrics"]["steady"]
    names = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")
    rows = [Row(["whole run", *(number(metrics[name]) for name in names), number(metrics["duration_s"])])]
    if steady is not None:
        cells = [number(steady.get(name)) for name in names]
        rows.append(Row(["at full load", *cells, number(steady["seconds"])]))
    lag, loop = report["dispatch_lag_ms"], report["client"]["loop_lag_ms"]
    foot = (
        f"The client: {report['client']['workers']} process(es), requests left {number(lag['p99'])} ms late "
        f"and its event loop woke up {number(loop['p99'])} ms late (p99). Prompts held "
        f"{metrics['prompt_tokens']} and answers {metrics['output_tokens']} tokens in the server's count; "
        f"{report['requests']['warmups']} warm-up requests are in no figure."
    )
    head = ["", *(METRIC_NAMES[name] for name in names), "seconds"]
    return Section("Throughput", table=Table(head, rows), foot=foot)


def _server_section(report: Mapping[str, Any]) -> Section:
    server = report["server_metrics"]
    rows = []
    for name, value in server.items():
        if isinstance(value, Mapping) and "max" in value:
            rows.append(Row([name.replace("_", " "), number(value["mean"], 3), number(value["max"], 3)]))
        elif isinstance(value, Mapping) and "n" in value:
            rows.append(Row([name.replace("_ms", " (ms)").replace("_", " "), number(value["mean"], 3), ""]))
        elif isinstance(value, int | float) and name != "readings":
            rows.append(Row([name.replace("_", " "), number(value, 0), ""]))
    gap = report.get("server_ttft_gap_ms")
    foot = "" if gap is None else f"The client's mean TTFT is {gap:.2f} ms above the server's own."
    return Section("The server's own figures", table=Table(["", "mean or total", "max"], rows), foot=foot)


def compare_page(report: Mapping[str, Any]) -> Page:
    """Page of a comparison."""
    models = report["models"]
    names = [model["name"] for model in models]
    failed = sum(entry["failed"] for entry in report["scenarios"])
    notes = [Note("Not completed:", f"{failed} requests; see the JSON report.", "bad")] if failed else []
    if not all(entry["valid"] for entry in report["scenarios"]):
        notes.append(Note("Client too slow:", "some runs left late; their ratios may be off.", "bad"))
    chart, table = ratio_sections(report["scenarios"])
    others = [model["name"] for model in models if model["role"] == "compressed"]
    commands = [report["environment"]["command"], *(model.get("command", []) for model in models)]
    return Page(
        title=f"{' and '.join(others)} against {' and '.join(n for n in names if n not in others)}",
        subtitle=f"{report['config']['repeats']} paired repeats; servers: {report['config']['servers']}. "
        "A ratio above 1 means the compressed model is better.",
        tiles=compare_tiles(report["scenarios"]),
        notes=notes,
        sections=[
            chart,
            models_section(models, report["parity"].get("by_candidate", {})),
            table,
            distribution_section(report["scenarios"]),
            environment_section(report["environment"]),
            command_section(commands),
        ],
    )


def verdict(ratio: Mapping[str, Any]) -> str:
    """``better`` or ``worse`` when the whole interval is on one side of 1, else empty."""
    low, high = shown_interval(ratio)
    if low is not None and low > 1:
        return "better"
    return "worse" if high is not None and high < 1 else ""


def shown_interval(ratio: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The ends of a ratio's 95 % interval; None of fewer pairs than can give one that says something."""
    if ratio["pairs"] < FEWEST_TO_SHOW:
        return None, None
    low, high = ratio["ci95"]
    return low, high


def interval(ratio: Mapping[str, Any]) -> str:
    """The interval in words."""
    low, high = shown_interval(ratio)
    return f"n/a (below {FEWEST_TO_SHOW} repeats)" if low is None else f"{low:.2f} – {high:.2f}"


def entry_title(entry: Mapping[str, Any], scenarios: Sequence[Mapping[str, Any]]) -> str:
    """What an entry is about: the scenario, with the models' names where there are several."""
    title = str(entry["title"])
    if len({other.get("baseline") for other in scenarios}) > 1:
        return f"{entry['candidate']} to {entry['baseline']}: {title}"
    return f"{entry['candidate']}: {title}" if len({o.get("candidate") for o in scenarios}) > 1 else title


def compare_tiles(scenarios: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """One tile per scenario: the ratio of the metric it is about."""
    tiles = []
    for entry in scenarios:
        ratio = entry["ratio"].get(entry["headline"])
        if ratio is None:
            continue
        metric = METRIC_NAMES[entry["headline"]]
        label = entry_title(entry, scenarios)
        tiles.append(Tile(label, f"{ratio['value']:.2f}×", f"{metric}, {interval(ratio)}", verdict(ratio)))
    return tiles


def ratio_sections(scenarios: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Chart of the ratios, and a table of all of them."""
    rows: list[RatioRow] = []
    table: list[Row] = []
    for entry in scenarios:
        group = entry_title({**entry, "title": entry["name"]}, scenarios)
        title = entry_title(entry, scenarios)
        for metric, ratio in entry["ratio"].items():
            low, high = shown_interval(ratio)
            if metric not in TABLE_ONLY:
                rows.append(RatioRow(f"{group}: {METRIC_NAMES[metric]}", ratio["value"], low, high, group))
            sides = [_side_value(entry[side], metric, ratio) for side in ("dense", "compressed")]
            cells = [title, METRIC_NAMES[metric], *sides, interval(ratio), f"{ratio['value']:.3f}"]
            table.append(Row(cells, verdict(ratio)))
            title = ""
    repeats = max((entry["repeats"] for entry in scenarios), default=0)
    text = (
        f"Each dot is the geometric mean over {repeats} repeats in which both models got the same prompts, "
        "the bar its 95 % interval (over the pairs). Coloured when the whole interval lies on one "
        "side of 1."
    )
    if repeats < FEWEST_TO_SHOW:
        text += f" Intervals need {FEWEST_TO_SHOW} repeats, so there are no bars and no colours here."
    head = ["scenario", "metric", "dense", "compressed", "95 % interval", "ratio"]
    chart = Chart(ratio_chart(rows, title="Ratios to the dense model"))
    return [
        Section("Ratios", text=text, charts=[chart], wide=True),
        Section(
            "Figures behind the ratios",
            table=Table(head, table),
            foot="Latencies in ms, medians over the requests of a repeat, averaged over the repeats. "
            + DEFINITIONS,
        ),
    ]


def _side_value(metrics: Mapping[str, Any], metric: str, ratio: Mapping[str, Any]) -> str:
    value = metrics[metric]
    return number(value[ratio["statistic"]] if isinstance(value, Mapping) else value)


def models_section(
    models: Sequence[Mapping[str, Any]], distances: Mapping[str, Mapping[str, Any]]
) -> Section:
    """Size and quality of every model: speed is never shown without them."""
    rows = []
    for model in models:
        distance = distances.get(model["name"], {})
        agreement = distance.get("top1_agreement")
        rows.append(
            Row(
                [
                    model["name"],
                    megabytes(model.get("checkpoint_bytes")),
                    megabytes(model.get("resident_bytes")),
                    megabytes(model.get("memory", {}).get("pss_bytes")),
                    number(model.get("kv_cache_tokens"), 0),
                    number(model.get("start_seconds"), 1),
                    number(model.get("perplexity"), 3),
                    number(distance.get("mean_dlogprob"), 4),
                    "–" if agreement is None else f"{agreement:.2%}",
                ]
            )
        )
    head = [
        "model",
        "checkpoint",
        "weights resident",
        "server memory",
        "KV tokens",
        "start s",
        "perplexity",
        "mean |Δ logprob|",
        "top-1 agreement",
    ]
    positions = max((d["positions"] for d in distances.values()), default=0)
    foot = (
        f"Quality through the API's prompt log-probabilities over {positions} positions; distances are to "
        "the dense model. “Weights resident” is what the plugin reports for the layers it runs."
        if positions
        else "Quality was not measured."
    )
    return Section("Size and quality", table=Table(head, rows), foot=foot)


def distribution_section(scenarios: Sequence[Mapping[str, Any]]) -> Section:
    """Latency distributions of dense and compressed, side by side for each scenario."""
    charts = []
    groups: dict[str, list[Mapping[str, Any]]] = {}
    reference = scenarios[0].get("baseline") if scenarios else None
    for entry in scenarios:
        if entry.get("baseline") != reference:
            continue
        groups.setdefault(entry["name"], []).append(entry)
    for entries in groups.values():
        first = entries[0]
        name = "ttft_ms" if first["headline"] == "ttft_ms" else "e2e_ms"
        series: list[Series] = [distribution(first["samples"]["dense"][name], "dense", "s0")]
        for position, entry in enumerate(entries, start=1):
            label = entry.get("candidate", "compressed")
            series.append(distribution(entry["samples"]["compressed"][name], label, f"s{position % 6}"))
        caption = f"{first['title']}: {LATENCIES[name]}"
        chart = line_chart(
            series, title=caption, x_label="milliseconds", y_label="% of requests", y_range=(0, 100)
        )
        charts.append(Chart(chart, caption, legend(series)))
    return Section("Distribution of latencies", text="All repeats together.", charts=charts)
