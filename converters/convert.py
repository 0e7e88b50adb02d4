"""``vllm-sparse convert``: any readable checkpoint becomes one that vLLM loads, a few tensors at a time."""

import contextlib
import hashlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

from converters.card import EVAL_FILE, model_card
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.config_json import Compression, is_unicode
from converters.layers import Kind
from converters.manifest import NAME as MANIFEST
from converters.manifest import build_manifest, file_sha256, source_files
from converters.pickles import has_only_pickles, opened_pickles
from converters.plan import AT_A_TIME, Plan, ShardPlan, make_plan, peak_bytes, validate_and_decide
from converters.quantize import int4_group_size
from converters.readers import FORMATS, Reader, make_reader
from converters.readers.maskllm import MaskLLMReader
from converters.readers.structure import refuse_sliced_residual
from converters.readers.trained import gpt2_config
from converters.report import Report, dense_linears, linear_sparsity
from converters.safetensors_io import ShardWriter
from converters.sizes import size
from converters.staging import OWN_FILES, Staging, check_free, discarded_on_error, write_file
from converters.writers.align import check_align
from converters.writers.base import Decision, Writer
from converters.writers.dense import DenseWriter
from converters.writers.sparse24 import WEIGHTS, Sparse24Writer
from vllm_sparse import __version__
from vllm_sparse.errors import FormatError, UnsupportedError, UserError
from vllm_sparse.kernels.base import WeightFormat

logger = logging.getLogger(__name__)

TARGETS = ("sparse24", "structured", "dense")
# (phase, done, total) in bytes.
Progress = Callable[[str, int, int], None]
# Room for config, tokenizer, card and manifest beside the weights.
_SIDE_BYTES = 64 << 20


@dataclass(frozen=True)
class Options:
    """What to convert and how; see :func:`convert`."""

    source: str
    destination: str
    to: str
    weights: str
    format: str
    allow_pickle: bool = False
    align: int = 0
    dense: str | None = None

    def command(self) -> str:
        """The command line that repeats this conversion."""
        words = ["vllm-sparse", "convert", self.source, self.destination]
        if self.format != "auto":
            words += ["--format", self.format]
        words += ["--to", self.to]
        if self.weights != "keep":
            words += ["--weights", self.weights]
        if self.align:
            words += ["--align", str(self.align)]
        if self.dense is not None:
            words += ["--dense", self.dense]
        if self.allow_pickle:
            words.append("--allow-pickle")
        return shlex.join(words)


def _nothing(phase: str, done: int, total: int) -> None:
    del phase, done, total


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "sparse24",
    weights: str = "keep",
    *,
    format: str = "auto",
    resume: bool = False,
    dry_run: bool = False,
    max_memory: int | None = None,
    allow_pickle: bool = False,
    align: int = 0,
    dense: str | Path | None = None,
    progress: Progress = _nothing,
) -> Report:
    """Convert a checkpoint.

    Every tensor is read and checked before anything is written; shards are then written one tensor at a
    time into a hidden sibling folder that is renamed at the end. The source is never changed.

    Args:
        source: checkpoint folder, or a hub id.
        destination: folder to make; must not exist, or be empty.
        to: ``sparse24``, ``structured`` or ``dense``.
        weights: ``keep``, or ``int8``, ``fp8``, ``int4``, ``w4a8`` for the packed linears.
        format: the source's format; ``auto`` detects it.
        resume: continue an interrupted conversion of the same source and options.
        dry_run: check and plan only.
        max_memory: refuse when more bytes than this would be needed for weights.
        allow_pickle: open pickled weights and models (``.bin``, ``.pt``), as data, in a sandboxed process.
        align: with ``structured``, round feed-forward and expert widths up to multiples of this.
        dense: with ``align``, the unpruned model, whose best removed channels come back in place of zeros.
        progress: called with phase, bytes done, bytes in all.

    Returns:
        What was done.

    Raises:
        FormatError: broken input.
        NumericsError: NaN, Inf, or weights that are not 2:4 although their config says so.
        UnsupportedError: the conversion asked for does not exist.
        UserError: the destination is taken, the disk is full, memory is too small.
    """
    options = Options(
        str(source), str(destination), to, weights, format, allow_pickle, align, str(dense) if dense else None
    )
    _check_options(options)
    target, local = Path(destination), Path(source)
    if resume and (target / MANIFEST).is_file():
        raise UserError(f"{target} is finished: nothing is left to resume. Remove it to convert again.")
    # Before anything is unpickled beside the destination. What lies beside a single file is not the source.
    if local.exists():
        _check_places(local, target)
    check_free(target)
    with _opened(options, target) as reader:
        if not local.exists():
            _check_places(reader.checkpoint.path, target)
        return _convert(options, reader, target, resume, dry_run, max_memory, progress)


@contextlib.contextmanager
def _opened(options: Options, target: Path) -> Iterator[Reader]:
    """The reader of the source; unpickled weights lie next to the destination while it is used."""
    source = Path(options.source)
    if not options.allow_pickle or not has_only_pickles(source):
        yield make_reader(open_checkpoint(options.source), options.format)
        return
    with opened_pickles(source, Path(os.path.realpath(target)).parent) as (checkpoint, facts):
        if not checkpoint.config:
            refuse_sliced_residual(checkpoint.tensors)
            checkpoint = replace(checkpoint, config=gpt2_config(facts))
        yield make_reader(checkpoint, options.format)


def _convert(
    options: Options,
    reader: Reader,
    target: Path,
    resume: bool,
    dry_run: bool,
    max_memory: int | None,
    progress: Progress,
) -> Report:
    checkpoint = reader.checkpoint
    identity = source_files(checkpoint, masks=reader.format == MaskLLMReader.format)
    # A link out of the folder is refused before the work, not after it.
    sides = list(checkpoint.side_files())
    if dry_run:
        decisions = _decide(reader, options, progress)
        writer = make_writer(reader, options, decisions)
        plan = make_plan(decisions, writer, checkpoint.config)
        _check_memory(plan, max_memory)
        return _report(options, reader, plan, dry_run=True, notes=(*writer.notes, *_uniform(options, plan)))
    staging = Staging(target, _fingerprint(options, identity, checkpoint), resume)
    with discarded_on_error(staging):
        decisions = _recall(staging, reader) or _decide(reader, options, progress)
        staging.note("decisions", {d.entry.name: [d.pack, d.reason, d.zeros] for d in decisions})
        writer = make_writer(reader, options, decisions)
        plan = make_plan(decisions, writer, checkpoint.config)
        _check_memory(plan, max_memory)
        _check_space(plan, staging)
        notes = _write_shards(plan, reader, writer, staging, progress)
        report = _report(options, reader, plan, notes=(*writer.notes, *_uniform(options, plan), *notes))
        _write_sides(plan, sides, staging)
        _write_facts(report, options, checkpoint, identity, staging)
        staging.commit()
    return report


def _check_options(options: Options) -> None:
    for name, value, allowed in (
        ("--to", options.to, TARGETS),
        ("--weights", options.weights, tuple(WEIGHTS)),
        ("--format", options.format, FORMATS),
    ):
        if value not in allowed:
            raise UserError(f"{name} {value!r}: allowed are {', '.join(allowed)}")
    if options.weights != "keep" and options.to != "sparse24":
        raise UserError(f"--weights {options.weights} quantises 2:4 linears; it needs --to sparse24")
    if options.to != "structured" and (options.align or options.dense):
        raise UserError("--align and --dense shape pruned layers; they need --to structured")
    check_align(options.align, options.dense is not None)
    for path in (options.source, options.destination, options.dense or ""):
        if not is_unicode(path):
            raise UserError(
                f"the path {path!r} is not valid UTF-8, so card and manifest cannot name it; rename it"
            )


def _check_places(source: Path, target: Path) -> None:
    inside, real = target.resolve(), source.resolve()
    if inside == real or inside.is_relative_to(real):
        raise UserError(f"the destination {target} is the source or lies in it; the source is never changed")


def make_writer(reader: Reader, options: Options, decisions: list[Decision]) -> Writer:
    """The writer for the target format.

    Raises:
        FormatError: nothing to pack, or layers whose shapes contradict config.json.
        UnsupportedError: the writer does not know the model's family, or how its weights are stored.
    """
    config = reader.checkpoint.config
    if options.to == "dense":
        return DenseWriter(config)
    if options.to == "structured":
        from converters.writers.structured import StructuredWriter

        packed = [
            entry for entry in reader.entries() if entry.parts and entry.name not in reader.checkpoint.tensors
        ]
        if packed:
            raise UnsupportedError(
                f"{packed[0].name} is stored as {packed[0].stored}; structured models are made of plain "
                "weights. Convert with --to dense first, then the result with --to structured."
            )
        dense = open_checkpoint(options.dense) if options.dense else None
        return StructuredWriter(reader.checkpoint, options.align, dense)
    packed = [item.entry for item in decisions if item.pack]
    if not packed:
        reasons = dense_linears(decisions)
        found = "; ".join(f"{module}: {why}" for module, why in list(reasons.items())[:3])
        raise FormatError(
            f"no linear layer of {reader.checkpoint.path} can be packed as 2:4 "
            f"({found or 'it has no linears'}). "
            "Prune it first: vllm-sparse compress, or use --to dense."
        )
    int4 = WEIGHTS[options.weights] is WeightFormat.INT4
    group = int4_group_size([entry.shape[1] for entry in packed]) if int4 else 128
    return Sparse24Writer(Compression(config), options.weights, group)


def _uniform(options: Options, plan: Plan) -> tuple[str, ...]:
    """What a structured conversion comes to when no layer differs from another."""
    if options.to != "structured" or "per_layer_config" in plan.config:
        return ()
    count, (architecture, *_) = plan.config["num_hidden_layers"], plan.config["architectures"]
    return (
        f"no layer of the {count} differs from another in shape, so nothing is recorded for single layers: "
        f"the result is an ordinary {architecture}. Weights that are zero are not cut out; for 2:4 zeros use "
        "--to sparse24, for smaller layers prune first (vllm-sparse compress)",
    )


def _decide(reader: Reader, options: Options, progress: Progress) -> list[Decision]:
    total = sum(entry.numel * entry.dtype.itemsize for entry in reader.entries())
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("checking", done, total)

    progress("checking", 0, total)
    return validate_and_decide(reader, options.to == "sparse24", tick)


def _fingerprint(options: Options, identity: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    facts: list[Any] = [__version__, options.to, options.weights, options.format]
    facts += [identity, _times(checkpoint, identity)]
    if options.align:
        facts += [options.align, options.dense]
    if options.dense:
        dense = open_checkpoint(options.dense)
        files = source_files(dense)
        facts += [files, _times(dense, files)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _times(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    return {name: (checkpoint.path / name).stat().st_mtime_ns for name in names}


def _recall(staging: Staging, reader: Reader) -> list[Decision] | None:
    found = staging.journal.get("decisions")
    if not isinstance(found, dict):
        return None
    entries = reader.entries()
    if {entry.name for entry in entries} != set(found):
        return None
    return [Decision(entry, *found[entry.name]) for entry in entries]


def _check_memory(plan: Plan, limit: int | None) -> None:
    needed = peak_bytes(plan)
    if limit is not None and needed > limit:
        raise UserError(
            f"the largest tensor needs about {size(needed)} while it is converted, more than "
            f"--max-memory {size(limit)}; raise it or convert on a larger machine"
        )


def _check_space(plan: Plan, staging: Staging) -> None:
    have = sum(record["bytes"] for record in staging.journal["files"].values())
    needed = max(0, plan.nbytes - have) + _SIDE_BYTES
    free = shutil.disk_usage(staging.path).free
    if needed > free:
        raise UserError(
            f"no space left for {staging.destination}: it needs {size(needed)}, {size(free)} "
            "are free "
            "there. Free some space or choose another disk."
        )


def _write_shards(
    plan: Plan, reader: Reader, writer: Writer, staging: Staging, progress: Progress
) -> tuple[str, ...]:
    """Write what is not finished yet, a few shards at a time."""
    reader.validated = True
    counting, stopping = Lock(), Event()
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        if stopping.is_set():
            raise CancelledError
        with counting:
            done += count
            progress("writing", done, plan.nbytes)

    with ThreadPoolExecutor(AT_A_TIME) as workers:
        shards = [workers.submit(_write_shard, shard, reader, writer, staging, tick) for shard in plan.shards]
        try:
            notes = [shard.result() for shard in shards]
        finally:
            # After an error or Ctrl-C no further shard is begun, and those in the making stop at a tensor.
            stopping.set()
            for shard in shards:
                shard.cancel()
    return tuple(note for part in notes for note in part)


def _write_shard(
    shard: ShardPlan, reader: Reader, writer: Writer, staging: Staging, tick: Callable[[int], None]
) -> list[str]:
    """Write, hash, sync and record one shard, unless an earlier run did; returns its notes."""
    record = staging.finished(shard.name)
    if record is not None:
        tick(shard.nbytes)
        return list(record.get("notes", ()))
    notes: list[str] = []
    out = ShardWriter(staging.path / shard.name, shard.specs, {"format": "pt"})
    try:
        for decision in shard.decisions:
            loaded = reader.load(decision.entry)
            writer.write(decision, loaded, out)
            notes.extend(loaded.notes)
            tick(sum(spec.nbytes for spec in writer.specs(decision)))
        digest = out.close()
    finally:
        out.abort()
    staging.record(out.path.name, digest, out.nbytes, notes=notes)
    return notes


def _report(
    options: Options, reader: Reader, plan: Plan, dry_run: bool = False, notes: tuple[str, ...] = ()
) -> Report:
    linears = [item for item in plan.decisions if item.entry.kind is Kind.LINEAR]
    return Report(
        source=options.source,
        destination=options.destination,
        source_format=reader.format,
        target=options.to,
        weights=options.weights,
        dry_run=dry_run,
        packed=sum(item.pack for item in linears),
        dense=dense_linears(plan.decisions),
        sparsity=linear_sparsity(plan.decisions),
        source_bytes=reader.checkpoint.total_bytes,
        destination_bytes=plan.nbytes,
        notes=notes,
    )


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _write_sides(plan: Plan, sides: Sequence[Path], staging: Staging) -> None:
    write_file(staging.path / "config.json", _as_json(plan.config))
    if len(plan.shards) > 1:
        write_file(staging.path / "model.safetensors.index.json", _as_json(plan.index()))
    for path in sides:
        # An evaluation is of the source's weights, which the result need not have; the card cites it.
        if path.name in (MANIFEST, EVAL_FILE, *OWN_FILES):
            continue
        name = "README.source.md" if path.name == "README.md" else path.name
        write_file(staging.path / name, path.read_bytes())


def _write_facts(
    report: Report, options: Options, checkpoint: Checkpoint, identity: Mapping[str, Any], staging: Staging
) -> None:
    card = model_card(report, checkpoint.path, options.command())
    write_file(staging.path / "README.md", card.encode("utf-8"))
    shards = staging.journal["files"]
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(staging.path.iterdir()):
        if path.name in shards:
            files[path.name] = {key: shards[path.name][key] for key in ("sha256", "bytes")}
        elif path.name not in OWN_FILES:
            files[path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    write_file(staging.path / MANIFEST, _as_json(build_manifest(report, identity, files, __version__)))
