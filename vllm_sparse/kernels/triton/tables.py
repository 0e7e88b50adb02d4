"""Tables of measured configurations: their file format, where they are found, and look-up.

A table is JSON: ``{"schema": "vllm-sparse/triton-configs/1", "machine": <device name>, "measured": bool,
"environment": {...}, "entries": [{"weight", "n", "k", "tokens", "route", "block_n", "tokens_per_program",
"split_k", "warps", "stages", "us"}]}``, and in an entry that has them ``"cluster": true``, ``"programs"``
and ``"quantized": true`` (activations; without an entry of their own such layers take the other one).
``tokens`` is the largest token count of a bin, of the last bin the one that was measured. Committed tables
lie in ``tuned/``, named after the device; ``VLLM_SPARSE_TRITON_CONFIGS`` names a file that comes first.
"""

import json
import logging
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm_sparse.errors import FormatError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.cuda import configs as cuda_configs
from vllm_sparse.kernels.triton.configs import (
    CUDA_ROUTES,
    MOST_DOT_TOKENS,
    TOKEN_BINS,
    Config,
    Machine,
    Route,
    Shape,
    default_config,
    token_bin,
)

logger = logging.getLogger(__name__)

SCHEMA = "vllm-sparse/triton-configs/1"
ENV_CONFIGS = "VLLM_SPARSE_TRITON_CONFIGS"
_FOLDER = Path(__file__).parent / "tuned"

Table = dict[tuple[Shape, int], Config]


def table_path(machine_name: str) -> Path:
    """Where the committed table of a device lies, whether or not it exists."""
    return _FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', machine_name.lower()).strip('-')}.json"


def read_table(path: Path) -> Table:
    """Read one table.

    Raises:
        FormatError: see :func:`read_times`.
    """
    return {key: config for key, (config, _) in read_times(path).items()}


def read_times(path: Path) -> dict[tuple[Shape, int], tuple[Config, float]]:
    """Read one table with the microseconds of its entries, 0 where it has none.

    Raises:
        FormatError: the file is not a table of this schema; says what is wrong with it.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not a readable table of kernel configurations: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise FormatError(f"{path} is not a table of schema {SCHEMA}; remove it or tune again")
    entries = document.get("entries", [])
    if not isinstance(entries, list):
        raise FormatError(f"{path} is not a table of schema {SCHEMA}: its entries are not a list")
    table: dict[tuple[Shape, int], tuple[Config, float]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise FormatError(f"{path}, entry {number}: {entry!r} is not an object")
        try:
            quantized = bool(entry.get("quantized", False))
            shape = Shape(WeightFormat(entry["weight"]), int(entry["n"]), int(entry["k"]), quantized)
            us = float(entry.get("us", 0.0))
            table[shape, int(entry["tokens"])] = (_config(entry, shape.weight), us)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}, entry {number}: {type(error).__name__}: {error}") from error
    return table


def _config(entry: dict[str, Any], weight: WeightFormat) -> Config:
    rows, tokens, split_k, warps, stages = (
        int(entry[key]) for key in ("block_n", "tokens_per_program", "split_k", "warps", "stages")
    )
    clustered, programs = bool(entry.get("cluster", False)), int(entry.get("programs", 0))
    config = Config(Route(entry["route"]), rows, tokens, split_k, warps, stages, clustered, programs)
    powers = (config.block_n, config.tokens, config.split_k, config.warps)
    if any(value < 1 or value & (value - 1) for value in powers) or config.stages < 1 or config.block_n < 16:
        raise ValueError(f"block_n (at least 16), tokens, split_k and warps must be powers of two: {config}")
    if config.route is Route.SELECT and config.tokens < int(entry["tokens"]):
        raise ValueError("a select entry must take all tokens of its bin in one program")
    if (config.cluster or config.programs) and config.route not in CUDA_ROUTES:
        raise ValueError(f"only the CUDA C++ kernels run in clusters: {config}")
    if config.route in CUDA_ROUTES:
        reason = cuda_configs.instance_reason(config, weight)
        if reason is not None:
            raise ValueError(f"the CUDA C++ kernel: {reason}")
    return config


def write_table(
    path: Path,
    machine: Machine,
    environment: dict[str, str],
    timed: dict[tuple[Shape, int], tuple[Config, float]],
) -> None:
    """Write measured configurations, one entry a line, sorted.

    Args:
        path: the file to replace.
        machine: where they were measured.
        environment: versions to record.
        timed: the best configuration of each ``(shape, tokens)`` and its time in microseconds.
    """
    lines = []
    for (shape, tokens), (config, us) in sorted(
        timed.items(),
        key=lambda item: (item[0][0].weight, item[0][0].quantized, item[0][0].n, item[0][0].k, item[0][1]),
    ):
        entry = {
            "weight": shape.weight.value,
            "n": shape.n,
            "k": shape.k,
            "tokens": tokens,
            "route": config.route.value,
            "block_n": config.block_n,
            "tokens_per_program": config.tokens,
            "split_k": config.split_k,
            "warps": config.warps,
            "stages": config.stages,
            "us": round(us, 2),
        }
        if config.cluster:
            entry["cluster"] = True
        if config.programs:
            entry["programs"] = config.programs
        if shape.quantized:
            entry["quantized"] = True
        lines.append("  " + json.dumps(entry))
    head = {"schema": SCHEMA, "machine": machine.name, "measured": True, "environment": environment}
    body = json.dumps(head)[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"
    staging = path.with_suffix(".tmp")
    staging.write_text(body)
    staging.replace(path)


@cache
def _tables(machine_name: str) -> tuple[Table, ...]:
    """The tables that apply, first the one that wins. A named file must be readable."""
    tables = []
    named = os.environ.get(ENV_CONFIGS, "").strip()
    if named:
        tables.append(read_table(Path(named)))
    committed = table_path(machine_name)
    if committed.exists():
        tables.append(read_table(committed))
    logger.debug("%d tables of kernel configurations apply to %s", len(tables), machine_name)
    return tuple(tables)


def has_programs(machine_name: str) -> bool:
    """Whether a table that applies names a configuration with a number of programs.

    Raises:
        FormatError: a table cannot be read.
    """
    return any(config.programs for table in _tables(machine_name) for config in table.values())


def forget() -> None:
    """Read the tables again at the next choice: one has been written, or the environment has changed."""
    _tables.cache_clear()
    choose.cache_clear()


@cache
def choose(shape: Shape, m: int, machine: Machine) -> Config:
    """The configuration for ``m`` tokens: from a table, else a rule, that of the kernels that serve by it."""
    for table in _tables(machine.name):
        found = _look_up(table, shape, token_bin(m))
        if found is not None:
            return found
    if cuda_configs.serves_without_a_table(machine):
        return cuda_configs.default_config(shape, m, machine)
    return default_config(shape, m, machine)


def _look_up(table: Table, shape: Shape, bin_: int) -> Config | None:
    """The bin's own entry, else a neighbour's; that of quantised activations first, if they are asked."""
    shapes = dict.fromkeys((shape, replace(shape, quantized=False)))
    own = [table[asked, bin_] for asked in shapes if (asked, bin_) in table]
    neighbours = [_neighbour(table, asked, bin_) for asked in shapes]
    return next((config for config in (*own, *neighbours) if config is not None), None)


def _neighbour(table: Table, shape: Shape, bin_: int) -> Config | None:
    """What a table says of another bin, for one that it does not have.

    The CUDA C++ kernels take any number of tokens: the next larger bin's configuration does the same work as
    for its own, if a program does not take more tokens than there are. The largest bin's is for more tokens
    too: of ``wgmma_sp_tma`` for any number, but without parts of K, whose float32 sums grow with the tokens
    and pay only where these are few; of ``mma_sp`` for a few passes, which find the weights in the L2 cache.
    Triton's configurations are cut for their own bin. Not measured bin by bin.
    """
    ours = {tokens: table.get((shape, tokens)) for tokens in TOKEN_BINS}
    found = [tokens for tokens, config in ours.items() if config is not None and config.route in CUDA_ROUTES]
    larger = [tokens for tokens in found if tokens > bin_]
    if larger:
        config = ours[min(larger)]
        fits = config is None or config.tokens <= max(bin_, cuda_configs.MAX_TOKENS)
        return config if fits else None
    config = ours[max(found)] if found and max(found) >= cuda_configs.MAX_TOKENS else None
    if config is not None and config.route is Route.WGMMA_SP_TMA:
        return replace(config, split_k=1)
    fits = config is not None and config.route is Route.MMA_SP and bin_ <= MOST_DOT_TOKENS
    return config if fits else None
