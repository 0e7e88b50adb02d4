"""When requests are sent: open-loop arrival processes and trace replay.

A schedule is an array of seconds after the start of the run, ascending, one entry per request. The
stochastic ones follow ``vllm bench serve``: gamma-distributed gaps (shape = burstiness, mean = 1/rate),
scaled so that the last request is due at exactly ``n / rate``, which makes runs of equal rate equally long.
"""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from vllm_sparse.errors import FormatError, UserError

FloatArray = npt.NDArray[np.float64]


def open_loop(n: int, rate: float, burstiness: float, seed: int) -> FloatArray:
    """Arrival times in seconds.

    Args:
        n: Number of requests.
        rate: Requests per second; infinity sends everything at once.
        burstiness: Shape of the gamma gaps: 1 is Poisson, below 1 burstier, infinity constant.
        seed: Seed of the gaps.
    """
    if not rate > 0:
        raise UserError(f"request rate is {rate}; it must be positive (inf sends everything at once).")
    if not burstiness > 0:
        raise UserError(f"burstiness is {burstiness}; it must be positive (1 = Poisson, inf = constant).")
    if math.isinf(rate):
        return np.zeros(n)
    if math.isinf(burstiness):
        return np.arange(1, n + 1) / rate
    gaps = np.random.default_rng(seed).gamma(shape=burstiness, scale=1 / (rate * burstiness), size=n)
    times = np.cumsum(gaps)
    if n and times[-1] == 0:
        raise UserError(f"burstiness is {burstiness}, which leaves no gap above 0; use a larger one.")
    return np.asarray(times * (n / rate / times[-1])) if n else times


def ramp(n: int, start_rate: float, end_rate: float) -> FloatArray:
    """Deterministic arrivals whose rate grows linearly in time from ``start_rate`` to ``end_rate``.

    The integral of the rate reaches i at the i-th arrival: r0 t + (r1 - r0) t² / 2T = i, T = 2n / (r0 + r1).
    """
    if not (start_rate > 0 and end_rate > 0):
        raise UserError(f"ramp from {start_rate} to {end_rate} requests/s; both rates must be positive.")
    count = np.arange(1, n + 1, dtype=np.float64)
    length = 2 * n / (start_rate + end_rate)
    slope = (end_rate - start_rate) / length
    if slope == 0:
        return count / start_rate
    return np.asarray((np.sqrt(start_rate**2 + 2 * slope * count) - start_rate) / slope)


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One recorded request.

    Attributes:
        at: Arrival in seconds after the first one.
        input_len: Prompt tokens; None in a file of times alone.
        output_len: Generated tokens; None in a file of times alone.
        blocks: Hashes of the prompt's blocks of 512 tokens (Mooncake), equal where prompts are.
    """

    at: float
    input_len: int | None = None
    output_len: int | None = None
    blocks: tuple[int, ...] = ()


_TIME_KEYS = ("timestamp", "Timestamp", "time")
_INPUT_KEYS = ("input_length", "Request tokens", "input_len", "prompt_tokens")
_OUTPUT_KEYS = ("output_length", "Response tokens", "output_len", "completion_tokens")


def read_trace(path: Path, *, speed: float = 1.0, limit: int | None = None) -> list[TraceEntry]:
    """Read a request trace.

    Accepted: JSON lines with ``timestamp`` in milliseconds and ``hash_ids`` (Mooncake), CSV with
    ``Timestamp`` in seconds (BurstGPT), lengths under the names both use; and text with one time in seconds
    per line. Rows that generate no token (BurstGPT marks failed calls so) are left out.

    Args:
        path: The trace file, ``.jsonl``, ``.csv`` or ``.txt``.
        speed: Above 1 replays faster than recorded.
        limit: Keep only that many requests.

    Raises:
        FormatError: The file is missing or does not hold that.
        UserError: ``speed`` is not positive.
    """
    if not path.is_file():
        raise FormatError(
            f"{path}: no such trace file. Give a .jsonl (Mooncake), .csv (BurstGPT) or .txt (times) file."
        )
    if not speed > 0:
        raise UserError(f"trace speed is {speed}; it must be positive.")
    try:
        recorded = _entries(path)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    entries = sorted((e for e in recorded if e.output_len != 0), key=lambda e: e.at)[:limit]
    if not entries:
        raise FormatError(f"{path}: no request with an output length above 0.")
    origin = entries[0].at
    return [replace(e, at=(e.at - origin) / speed) for e in entries]


def _entries(path: Path) -> list[TraceEntry]:
    if path.suffix == ".txt":
        return [TraceEntry(at) for at in _times(path)]
    is_csv = path.suffix == ".csv"
    rows = _csv_rows(path) if is_csv else _json_rows(path)
    unit = 1.0 if is_csv else 1e-3
    return [_entry(row, number, path, unit) for number, row in enumerate(rows, start=1)]


def _times(path: Path) -> list[float]:
    """One number per line; empty lines and lines that begin with # are left out."""
    times = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        time = _finite(text)
        if time is None:
            raise FormatError(f"{path}, line {number}: {text[:40]!r} is not a time in seconds.")
        times.append(time)
    return times


def _finite(text: str) -> float | None:
    """The number that ``text`` is; None where it is none, infinite or nan."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _csv_rows(path: Path) -> list[dict[str, object]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return [dict(row) for row in csv.DictReader(handle)]


def _json_rows(path: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise FormatError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise FormatError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
        rows.append(row)
    return rows


def _entry(row: dict[str, object], number: int, path: Path, unit: float) -> TraceEntry:
    def pick(names: tuple[str, ...]) -> float:
        for name in names:
            if row.get(name) not in (None, ""):
                value = _finite(str(row[name]))
                if value is None:
                    raise FormatError(f"{path}, record {number}: {name} is {row[name]!r}, not a number.")
                return value
        raise FormatError(f"{path}, record {number}: none of {', '.join(names)} is there.")

    hashes = row.get("hash_ids") or ()
    if not isinstance(hashes, list | tuple) or not all(isinstance(h, int) and h >= 0 for h in hashes):
        raise FormatError(f"{path}, record {number}: hash_ids is not a list of whole numbers.")
    lengths = int(pick(_INPUT_KEYS)), int(pick(_OUTPUT_KEYS))
    if min(lengths) < 0:
        raise FormatError(f"{path}, record {number}: lengths are {lengths[0]} in, {lengths[1]} out; below 0.")
    return TraceEntry(pick(_TIME_KEYS) * unit, *lengths, blocks=tuple(hashes))
