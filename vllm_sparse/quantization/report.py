"""What loading did, said once: a line per distinct layer kind, one summary, warnings for fallbacks."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from vllm.logger import init_logger

from vllm_sparse import metrics
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import LinearSpec
from vllm_sparse.kernels.dispatch import get_backend
from vllm_sparse.sparse24 import lost_minimum

# Below "vllm" so that vLLM's logging configuration applies to it.
logger = init_logger("vllm.plugins.vllm_sparse")

SPARSE, DENSE_BY_CONFIG, FALLBACK = "sparse", "dense", "fallback"


@dataclass
class LoadReport:
    """Counts layers while vLLM builds and loads them; complete when every created layer is processed."""

    started: float | None = None
    pending: int = 0
    layers: Counter[str] = field(default_factory=Counter)
    formats: Counter[tuple[str, str]] = field(default_factory=Counter)
    said: set[tuple[str, int, int, str]] = field(default_factory=set)
    advised: set[str] = field(default_factory=set)
    resident_bytes: int = 0
    dense_equivalent_bytes: int = 0
    int8_rows: int = 0
    short_rows: int = 0
    publisher: metrics.Publisher = field(default_factory=metrics.Publisher)

    def _start(self) -> None:
        # Not at construction: that happens in the API process, long before a worker builds its first layer.
        if self.started is None:
            self.started = time.perf_counter()

    def created(self) -> None:
        """A layer this plugin will have to process after loading."""
        self._start()
        self.pending += 1

    def dense_by_config(self) -> None:
        """A layer the config leaves dense."""
        self._start()
        self.layers[DENSE_BY_CONFIG] += 1

    def sparse(
        self, spec: LinearSpec, backend: str, resident: int, rejected: Sequence[tuple[str, str]]
    ) -> None:
        """A layer packed for ``backend``; ``resident`` in bytes."""
        self._packed(spec, backend, 1, resident, rejected)
        self._advise(get_backend(backend).advice(spec))
        self.layers[SPARSE] += 1
        self._processed()

    def _advise(self, advice: str | None) -> None:
        if advice is not None and advice not in self.advised:
            self.advised.add(advice)
            logger.warning("%s", advice)

    def experts(
        self,
        spec: LinearSpec,
        backend: str,
        count: int,
        resident: int,
        rejected: Sequence[tuple[str, str]],
        last: bool,
    ) -> None:
        """One projection of ``count`` experts; the layer counts once, with its ``last`` projection."""
        self._packed(spec, backend, count, resident, rejected)
        if last:
            self.layers[SPARSE] += 1
            self._processed()

    def experts_path(self, gate_up: LinearSpec, backend: str, path: str) -> None:
        """How tokens go through the experts of a layer, said once for each kind of layer."""
        key = (f"{gate_up.weight.value} experts, {path}", gate_up.n, gate_up.k, backend)
        if key not in self.said:
            self.said.add(key)
            logger.info(
                "2:4 %s experts, gate and up [%d, %d], go through the %s kernels %s",
                gate_up.weight.value,
                gate_up.n,
                gate_up.k,
                backend,
                path,
            )

    def _packed(
        self, spec: LinearSpec, backend: str, count: int, resident: int, rejected: Sequence[tuple[str, str]]
    ) -> None:
        key = (spec.weight.value, spec.n, spec.k, backend)
        if key not in self.said:
            self.said.add(key)
            passed_over = "; ".join(f"not {name}: {why}" for name, why in rejected)
            logger.info(
                "2:4 %s [%d, %d] runs on the %s kernels%s",
                spec.weight.value,
                spec.n,
                spec.k,
                backend,
                f" ({passed_over})" if passed_over else "",
            )
        self.formats[spec.weight.value, backend] += 1
        self.resident_bytes += resident
        self.dense_equivalent_bytes += count * spec.n * spec.k * spec.activation_dtype.itemsize

    def int8_values(self, values: Tensor) -> None:
        """The kept int8 values ``[rows, K/2]`` of a layer with a scale per row; looks for lost ones."""
        self.int8_rows += values.shape[0]
        self.short_rows += lost_minimum.count_short_rows(values)

    def fallback(self, layer: str, reason: str, dense_bytes: int) -> None:
        """A layer that was meant to be 2:4 and runs dense; an error under VLLM_SPARSE_STRICT=1."""
        self._warn_or_refuse(f"{layer} runs dense, not 2:4: {reason}")
        self.layers[FALLBACK] += 1
        self.resident_bytes += dense_bytes
        self.dense_equivalent_bytes += dense_bytes
        self._processed()

    def dense_part(self, part: str, layer: str, by_config: bool, dense_bytes: int) -> None:
        """A part of a fused layer that is stored and served dense, the others 2:4; it counts for itself.

        Args:
            part: its name in the checkpoint.
            layer: the fused layer's name.
            by_config: whether config.json leaves it dense; otherwise it is a fallback.
            dense_bytes: of its weight.
        """
        if not by_config:
            reason = f"the checkpoint stores it so; other parts of {layer} are 2:4"
            self._warn_or_refuse(f"{part} runs dense, not 2:4: {reason}")
        self.layers[DENSE_BY_CONFIG if by_config else FALLBACK] += 1
        self.resident_bytes += dense_bytes
        self.dense_equivalent_bytes += dense_bytes

    @staticmethod
    def _warn_or_refuse(message: str) -> None:
        if os.environ.get("VLLM_SPARSE_STRICT", "0") == "1":
            raise UnsupportedError(f"{message} (VLLM_SPARSE_STRICT=1 makes this an error)")
        logger.warning("%s", message)

    def _processed(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self._summarise()

    def _summarise(self) -> None:
        seconds = time.perf_counter() - (self.started or time.perf_counter())
        saved = self.resident_bytes / max(self.dense_equivalent_bytes, 1)
        logger.info(
            "2:4 loading done: %d layers sparse, %d dense by config, %d fallbacks; "
            "their weights take %.1f MiB instead of %.1f MiB dense (%.2fx)",
            self.layers[SPARSE],
            self.layers[DENSE_BY_CONFIG],
            self.layers[FALLBACK],
            self.resident_bytes / 2**20,
            self.dense_equivalent_bytes / 2**20,
            saved,
        )
        if lost_minimum.is_suspicious(self.short_rows, self.int8_rows):
            found = lost_minimum.message(self.short_rows, self.int8_rows)
            logger.warning("%s. %s", found, lost_minimum.ADVICE)
        self.publisher.publish(
            metrics.LoadFacts(
                layers=dict(self.layers),
                formats=[(fmt, backend) for fmt, backend in self.formats],
                resident_bytes=self.resident_bytes,
                dense_equivalent_bytes=self.dense_equivalent_bytes,
                load_seconds=seconds,
            )
        )
