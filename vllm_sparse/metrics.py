"""``vllm_sparse:*`` series on vLLM's /metrics, true for the worker processes.

The facts (layers, bytes, load time) are known in workers, /metrics is answered by the API process. Workers
therefore write one small JSON file per rank into a folder that the API process names in the environment
before it starts them; a prometheus collector in the API process reads those files at scrape time. With
several API servers vLLM turns on prometheus-client's multiprocess mode, where custom collectors are not
asked; there the workers write prometheus-client's multiprocess files instead.

Metrics never stop a server: where the folder cannot be made or written (a read-only file system, a rank on
another machine), a warning says so and the series are missing.
"""

import itertools
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sparse import __version__

logger = logging.getLogger("vllm.plugins.vllm_sparse")

FACTS_DIR_VARIABLE = "SPARSE24_FACTS_DIR"
_OWNER_VARIABLE = "SPARSE24_FACTS_OWNER"
_FILE_OWNER = "sparse24"


@dataclass(frozen=True)
class LoadFacts:
    """What one worker loaded of one model.

    Attributes:
        layers: layers by kind (``sparse``, ``dense``, ``fallback``).
        formats: (weight format, backend) pairs in use.
        resident_bytes: packed weights held in memory.
        dense_equivalent_bytes: what the same layers would take in the serving dtype.
        load_seconds: from building the first layer to packing the last.
    """

    layers: dict[str, int]
    formats: list[tuple[str, str]]
    resident_bytes: int
    dense_equivalent_bytes: int
    load_seconds: float


def prepare_folder() -> None:
    """Name the facts folder once, in the first process; its workers inherit it through the environment.

    So does any other program that a process with the plugin starts, a second server for instance. That is no
    worker, which vLLM starts through :mod:`multiprocessing`, and gets a folder of its own.
    """
    is_worker = multiprocessing.parent_process() is not None
    if FACTS_DIR_VARIABLE in os.environ and (
        is_worker or os.environ.get(_OWNER_VARIABLE) == str(os.getpid())
    ):
        return
    try:
        folder = tempfile.mkdtemp(prefix="vllm-sparse-")
    except OSError as error:
        logger.warning("no folder for this plugin's metrics, /metrics goes without them: %s", error)
        return
    os.environ[FACTS_DIR_VARIABLE] = folder
    os.environ[_OWNER_VARIABLE] = str(os.getpid())
    import atexit

    atexit.register(_remove_folder, folder, os.getpid())


def _remove_folder(folder: str, owner: int) -> None:
    # A forked child runs the same exit handlers; only the process that made the folder removes it.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


# What the models of this process have loaded; several when a program holds several engines.
_loaded: dict[int, LoadFacts] = {}
_numbers = itertools.count()
# A forked worker has none of its parent's models.
os.register_at_fork(after_in_child=_loaded.clear)


class Publisher:
    """Publishes the facts of one model and withdraws them when the model, which holds this, is gone."""

    def __init__(self) -> None:
        self._number: int | None = None

    def __reduce__(self) -> tuple[type["Publisher"], tuple[()]]:
        # A copy, in this process or a worker, belongs to another model.
        return (Publisher, ())

    def publish(self, facts: LoadFacts) -> None:
        """Called by a worker when its model is loaded."""
        if self._number is None:
            self._number = next(_numbers)
            weakref.finalize(self, _withdraw, self._number, os.getpid()).atexit = False
        _loaded[self._number] = facts
        _write()


def _withdraw(number: int, process: int) -> None:
    # Not in a forked child, where the parent's model is gone, too.
    if os.getpid() == process and _loaded.pop(number, None) is not None:
        _write()


def _write() -> None:
    try:
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            _write_multiprocess(Path(folder))
        elif folder := os.environ.get(FACTS_DIR_VARIABLE):
            _write_facts(Path(folder))
    except OSError as error:
        logger.warning("/metrics will lack this worker's vllm_sparse: series: %s", error)


def _write_facts(folder: Path) -> None:
    path = folder / f"{os.getpid()}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps([asdict(facts) for facts in _loaded.values()]))
    partial.replace(path)


def read_facts() -> list[LoadFacts]:
    """The facts of every model that living workers have loaded so far."""
    folder = os.environ.get(FACTS_DIR_VARIABLE)
    if not folder or not Path(folder).is_dir():
        return []
    paths = (path for path in sorted(Path(folder).glob("*.json")) if _is_alive(path.stem))
    loaded = (facts for path in paths for facts in json.loads(path.read_text()))
    return [LoadFacts(**{**facts, "formats": [tuple(pair) for pair in facts["formats"]]}) for facts in loaded]


def _is_alive(process: str) -> bool:
    return Path(f"/proc/{process}").exists()


Values = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Series:
    """One metric: name, help, label names, and its value for each tuple of label values."""

    name: str
    help: str
    labels: tuple[str, ...]
    values: Values


def series(facts: Iterable[LoadFacts]) -> list[Series]:
    """Facts of all workers as the documented series; ranks and models add up, load time is the slowest's."""
    listed = list(facts)
    layers: Counter[str] = Counter()
    for item in listed:
        layers.update(item.layers)
    info: Values = {(fmt, backend, __version__): 1.0 for item in listed for fmt, backend in item.formats}
    weight_bytes: Values = {
        ("dense_equivalent",): float(sum(item.dense_equivalent_bytes for item in listed)),
        ("resident",): float(sum(item.resident_bytes for item in listed)),
    }
    seconds: Values = {(): max(item.load_seconds for item in listed)} if listed else {}
    return [
        Series("vllm_sparse:info", "2:4 formats and kernels in use.", ("format", "backend", "version"), info),
        Series(
            "vllm_sparse:layers",
            "Linear layers by what serves them, over all ranks.",
            ("kind",),
            {(kind,): float(layers[kind]) for kind in ("sparse", "dense", "fallback")} if listed else {},
        ),
        Series(
            "vllm_sparse:weight_bytes",
            "Bytes of the layers this plugin serves: as held in memory, and as dense weights.",
            ("kind",),
            weight_bytes if listed else {},
        ),
        Series("vllm_sparse:load_seconds", "Time to load and pack, slowest rank.", (), seconds),
    ]


class FactsCollector:
    """prometheus-client collector over :func:`read_facts`."""

    def collect(self) -> Iterable[Any]:
        """Called at every scrape."""
        from prometheus_client.core import GaugeMetricFamily

        for item in series(read_facts()):
            if not item.values:
                continue
            family = GaugeMetricFamily(item.name, item.help, labels=item.labels)
            for labels, value in item.values.items():
                family.add_metric(labels, value)
            yield family


def register_collector() -> None:
    """Put the collector into the default registry of this process, unless multiprocess mode is on."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    from prometheus_client import REGISTRY

    REGISTRY.register(FactsCollector())


def _write_multiprocess(folder: Path) -> None:
    """Write the facts where the API servers' multiprocess collector reads.

    A ``Gauge`` would do only if the variable had been set before prometheus-client was imported, and a forked
    worker inherits an import from before; so the multiprocess values are used directly. The files bear a name
    of ours: two writers of one file, ours and the process's own gauges, would overwrite each other.
    """
    from prometheus_client.values import MultiProcessValue

    _remove_stale_files(folder)
    value_class = MultiProcessValue(lambda: f"{_FILE_OWNER}-{os.getpid()}")
    for item in series(_loaded.values()):
        mode = "livemax" if item.name in ("vllm_sparse:info", "vllm_sparse:load_seconds") else "livesum"
        for labels, value in item.values.items():
            value_class("gauge", item.name, item.name, item.labels, labels, item.help, mode).set(value)


def _remove_stale_files(folder: Path) -> None:
    """Remove what workers that are gone, or this one before, left behind."""
    for path in folder.glob(f"gauge_live*_{_FILE_OWNER}-*.db"):
        number = path.stem.rpartition("-")[2]
        if number == str(os.getpid()) or not _is_alive(number):
            path.unlink(missing_ok=True)
