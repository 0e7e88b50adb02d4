"""Speed of ``vllm-sparse convert`` against a plain copy of the same files: ``python -m bench.conversion``.

Makes a sharded 2:4 bf16 checkpoint of random weights, then copies it (``cp``) and converts it in turn, with
the source in the page cache or dropped from it. Both end with their files synced to the disk; ``cp`` without
the sync is shown as well. The conversion runs in a fresh process, which is timed from after its imports.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, FFN, VOCAB = 2048, 8192, 32000
# Of one decoder layer of that shape, in bf16.
_LAYER_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * FFN)


def make_checkpoint(folder: Path, gigabytes: float, shards: int) -> None:
    """A Llama-shaped checkpoint of random 2:4 weights; embedding and head are dense."""
    import torch
    from safetensors.torch import save_file
    from torch import Tensor

    generator = torch.Generator().manual_seed(0)
    layers = max(shards, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / _LAYER_BYTES))

    def matrix(rows: int, cols: int, pruned: bool = True) -> Tensor:
        weight = torch.empty(rows, cols, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if pruned:
            groups = weight.view(-1, 4)
            groups.scatter_(1, torch.rand(groups.shape, generator=generator).topk(2).indices, 0)
        return weight

    index: dict[str, str] = {}
    for shard in range(shards):
        tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, False)} if shard == 0 else {}
        for layer in range(shard * layers // shards, (shard + 1) * layers // shards):
            prefix = f"model.layers.{layer}"
            for name, rows, cols in (
                ("self_attn.q_proj", HIDDEN, HIDDEN),
                ("self_attn.k_proj", HIDDEN // 4, HIDDEN),
                ("self_attn.v_proj", HIDDEN // 4, HIDDEN),
                ("self_attn.o_proj", HIDDEN, HIDDEN),
                ("mlp.gate_proj", FFN, HIDDEN),
                ("mlp.up_proj", FFN, HIDDEN),
                ("mlp.down_proj", HIDDEN, FFN),
            ):
                tensors[f"{prefix}.{name}.weight"] = matrix(rows, cols)
        if shard == shards - 1:
            tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN, False)
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def drop_from_cache(folder: Path) -> None:
    """Write a folder's files back and take them out of the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_into_cache(folder: Path) -> None:
    """Read every file once."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def copy(source: Path, target: Path, sync: bool) -> dict[str, float]:
    """``cp -r``, then ``sync`` of the new files if asked for."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    return {"seconds": time.perf_counter() - start}


def _status_bytes(field: str) -> float:
    """A size from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def convert_here(source: Path, target: Path) -> dict[str, float]:
    """Convert in this process and time it."""
    from converters.convert import convert

    # Resets the high-water mark of resident memory, mapped files included.
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status_bytes("VmRSS")
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    convert(source, target)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": _status_bytes("VmHWM") - resident,
    }


def convert_in_child(source: Path, target: Path) -> dict[str, float]:
    """:func:`convert_here` in a fresh process."""
    command = [sys.executable, "-m", "bench.conversion", "--child", str(source), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(work: Path, source: Path, repeats: int, cold: bool) -> dict[str, list[dict[str, float]]]:
    """All ways in turn, ``repeats`` times."""
    ways: dict[str, Callable[[Path], dict[str, float]]] = {
        "cp": lambda target: copy(source, target, sync=False),
        "cp + sync": lambda target: copy(source, target, sync=True),
        "convert": lambda target: convert_in_child(source, target),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            target = work / "target"
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            drop_from_cache(source) if cold else read_into_cache(source)
            found[name].append(way(target))
    shutil.rmtree(work / "target", ignore_errors=True)
    return found


def report(source_bytes: int, shards: int, results: dict[str, Any]) -> None:
    """A line per cache state and way, and the ratio of the medians."""
    out = sys.stdout.write
    out(f"{source_bytes / 1e9:.2f} GB in {shards} shards, 2:4 bf16, {os.cpu_count()} cores\n")
    for cache, ways in results.items():
        medians = {name: statistics.median(r["seconds"] for r in runs) for name, runs in ways.items()}
        for name, runs in ways.items():
            seconds = sorted(r["seconds"] for r in runs)
            rate = source_bytes / 1e9 / medians[name]
            spread = f"({seconds[0]:.2f} to {seconds[-1]:.2f})"
            line = f"{cache:5} {name:10} {medians[name]:6.2f} s {spread}  {rate:5.2f} GB/s"
            if name == "convert":
                cpu = statistics.median(r["cpu_seconds"] for r in runs)
                peak = max(r["peak_bytes"] for r in runs)
                line += f"  {cpu:.2f} CPU-s, peak memory {peak / 1e9:.2f} GB over the imports"
            out(line + "\n")
        for name in ("cp", "cp + sync"):
            out(f"{cache:5} convert / {name}: {medians[name] / medians['convert']:.2f} of its throughput\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.conversion", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--gigabytes", type=float, default=3.0, help="size of the checkpoint, at least one layer a shard"
    )
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", choices=("warm", "cold", "both"), default="both")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--source", type=Path, help="use this checkpoint instead of making one")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.source is not None and not any(options.source.glob("*.safetensors")):
        parser.error(f"--source {options.source} holds no *.safetensors; give a checkpoint's folder")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    if options.child:
        import converters.convert  # noqa: F401 - imports are not what is measured

        sys.stdout.write(json.dumps(convert_here(*options.child)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="vllm-sparse-conversion-") as name:
        work = Path(name)
        source = options.source or work / "source"
        if options.source is None:
            source.mkdir()
            make_checkpoint(source, options.gigabytes, options.shards)
        caches = ("warm", "cold") if options.cache == "both" else (options.cache,)
        results = {cache: measure(work, source, options.repeats, cache == "cold") for cache in caches}
        shards = sorted(source.glob("*.safetensors"))
        report(sum(path.stat().st_size for path in shards), len(shards), results)


if __name__ == "__main__":
    main()
