"""Ways to break a checkpoint folder. Each takes a seeded generator, changes files and says what it did."""

import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOMBS = (
    "re:(a+)+$",
    "re:^(.*)*x$",
    "re:(.|.)*(.|.)*(.|.)*!",
    "re:((((((((((.*)*)*)*)*)*)*)*)*)*)*z",
    "re:[",
    "re:(?P<n>",
    "re:" + "(" * 500,
    "re:" + "a" * 5000,
    "re:.{1000000000}",
    "re:(?:" + "x?" * 40 + "){40}",
)
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, 1e308, float("inf"), "",
    "x",
    "2:4", "0:0", "dense", "sparse-24-bitmask", "sparse-bitmask", "marlin-24", "pack-quantized", "sparse24",
    "compressed-tensors", "gptq", "int8", "int4", "fp8_e4m3", "bf16", "../../etc/passwd", "/etc/passwd",
    "\x00", "\ud83d\ude00", "a" * 10000, "{0.__class__}", "__import__('os')", [], {}, [[]], [None], {"": {}},
    [1, 2, 3], ["Linear"], {"a": [{}]}, *BOMBS,
)  # fmt: skip
SHARD_NAMES = (
    "../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors",
    "x\0.safetensors",
    "model.bin", "model.safetensors.", "config.json", "model-99999-of-00002.safetensors", None, 3, [], {},
)  # fmt: skip
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    1 << 20,
    1 << 31,
    1 << 40,
    1 << 62,
    1 << 64,
    10**40,
    0.5,
    "8",
    None,
    True,
    [],
)
DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "I16",
    "I32",
    "I64",
    "F8_E4M3",
    "F8_E5M2",
    "F16",
    "BF16",
    "F32",
    "F64",
    "F99",
    "",
    3,
)

# What working on a file raises that an earlier change has spoilt.
_NOTHING_LEFT = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RecursionError, struct.error,
    zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip

Mutation = Callable[[random.Random, Path], str]


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _flip(rng: random.Random, path: Path, begin: int, end: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(begin, min(end, len(data)))
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _split(path: Path) -> tuple[bytes, bytes]:
    """Header text and data of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


def _join(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def flip_header_bits(rng: random.Random, folder: Path) -> str:
    path = rng.choice(_shards(folder))
    _flip(rng, path, 0, 8 + len(_split(path)[0]))
    return "flip bits in a header"


def flip_data_bits(rng: random.Random, folder: Path) -> str:
    path = rng.choice(_shards(folder))
    _flip(rng, path, 8 + len(_split(path)[0]), path.stat().st_size)
    return "flip bits in the data"


def cut_or_grow(rng: random.Random, folder: Path) -> str:
    path = rng.choice(_shards(folder))
    data = path.read_bytes()
    if rng.random() < 0.7:
        path.write_bytes(data[: rng.randrange(len(data))])
        return "cut a shard"
    path.write_bytes(data + rng.randbytes(rng.randrange(1, 64)))
    return "grow a shard"


def header_length(rng: random.Random, folder: Path) -> str:
    path = rng.choice(_shards(folder))
    header, data = _split(path)
    choices = (
        0,
        1,
        len(header) - 1,
        len(header) + 1,
        1 << 31,
        1 << 62,
        (1 << 64) - 1,
        rng.randrange(1 << 16),
    )
    _join(path, header, data, rng.choice(choices))
    return "change the length of a header"


def header_field(rng: random.Random, folder: Path) -> str:
    path = rng.choice(_shards(folder))
    header, data = _split(path)
    entries = json.loads(header)
    name = rng.choice([key for key in entries if key != "__metadata__"])
    entry = entries[name]
    what = rng.choice(("dtype", "shape", "offsets", "drop", "rename", "copy", "swap", "junk", "metadata"))
    if what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "shape":
        shape = entry["shape"]
        change = rng.choice(("value", "append", "pop", "reverse", "junk"))
        if change == "value" and shape:
            shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
        elif change == "append":
            shape.append(rng.choice(NUMBERS))
        elif change == "pop" and shape:
            shape.pop()
        elif change == "reverse":
            shape.reverse()
        else:
            entry["shape"] = rng.choice(STRANGE)
    elif what == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif what == "drop":
        del entries[name]
    elif what == "rename":
        part = rng.choice(("compressed", "bitmask", "shape", "weight", "weight_scale", "meta", "s", "\u0000"))
        entries[f"{name.rpartition('.')[0]}.{part}"] = entries.pop(name)
    elif what == "copy":
        entries[name + rng.choice((".copy", "_proj.weight"))] = entry
    elif what == "swap":
        other = rng.choice([key for key in entries if key != "__metadata__"])
        entries[name], entries[other] = entries[other], entries[name]
    elif what == "junk":
        entries[name] = rng.choice(STRANGE)
    else:
        entries["__metadata__"] = rng.choice(STRANGE)
    _join(path, json.dumps(entries).encode("utf-8", "surrogatepass"), data)
    return f"header: {what}"


def _paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _paths(item, (*prefix, key))
    return found


def config_field(rng: random.Random, folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    places = _paths(config)
    inner = [place for place in places if place[0] == "quantization_config"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.choice(inner if inner and rng.random() < 0.8 else places)
        holder: Any = config
        try:
            for key in place[:-1]:
                holder = holder[key]
            if rng.random() < 0.2:
                del holder[place[-1]]
            elif isinstance(holder, dict) and rng.random() < 0.1:
                holder[rng.choice(("x", "ignore", "targets", "format", "text_config"))] = rng.choice(STRANGE)
            else:
                holder[place[-1]] = rng.choice(STRANGE)
        except (KeyError, IndexError, TypeError):
            continue
    path.write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
    return "config: change a field"


def config_regex(rng: random.Random, folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    block = config.get("quantization_config")
    if not isinstance(block, dict):
        return config_field(rng, folder)
    pieces = (
        "a",
        ".",
        "*",
        "+",
        "(",
        ")",
        "[",
        "]",
        "|",
        "?",
        "{2}",
        "\\d",
        "layers",
        "proj",
        "^",
        "$",
        "(?=",
        "\\1",
    )
    made = "re:" + "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 30)))
    pattern = rng.choice(BOMBS) if rng.random() < 0.3 else made
    holder = rng.choice([block, block.get("sparsity_config") or block])
    holder[rng.choice(("ignore", "targets"))] = [pattern]
    path.write_text(json.dumps(config))
    return "config: regular expression"


def config_bytes(rng: random.Random, folder: Path) -> str:
    path = folder / "config.json"
    if rng.random() < 0.3:
        opening = rng.choice((b"[", b'{"a":', b'{"quantization_config":'))
        path.write_bytes(opening * rng.choice((1, 100, 100_000)))
        return "config: nesting"
    _flip(rng, path, 0, path.stat().st_size)
    return "config: flip bits"


def index_entry(rng: random.Random, folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return header_field(rng, folder)
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    what = rng.choice(("name", "drop", "ghost", "map", "file"))
    if what == "name":
        index["weight_map"][name] = rng.choice(SHARD_NAMES)
    elif what == "drop":
        del index["weight_map"][name]
    elif what == "ghost":
        index["weight_map"][name + "x"] = index["weight_map"][name]
    elif what == "map":
        index["weight_map"] = rng.choice(STRANGE)
    else:
        path.write_bytes(path.read_bytes()[: rng.randrange(200)])
        return "index: cut"
    path.write_text(json.dumps(index))
    return f"index: {what}"


def lose_or_swap_files(rng: random.Random, folder: Path) -> str:
    paths = [path for path in folder.iterdir() if path.is_file()]
    first, second = rng.choice(paths), rng.choice(paths)
    if rng.random() < 0.5:
        first.unlink()
        return "lose a file"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    return "swap two files"


def archive(rng: random.Random, folder: Path) -> str:
    """Of the npz or the pickle, both zip files."""
    found = [*folder.glob("*.npz"), *folder.glob("*.bin")]
    if not found:
        return flip_data_bits(rng, folder)
    path = found[0]
    if rng.random() < 0.5:
        _flip(rng, path, 0, path.stat().st_size)
        return "archive: flip bits"
    with zipfile.ZipFile(path) as zipped:
        members = {name: bytearray(zipped.read(name)) for name in zipped.namelist()}
    name = rng.choice(list(members))
    what = rng.choice(("flip", "cut", "drop", "rename", "grow"))
    if what == "flip" and members[name]:
        members[name][rng.randrange(len(members[name]))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        members[name] = members[name][: rng.randrange(len(members[name]) + 1)]
    elif what == "drop":
        del members[name]
    elif what == "rename":
        members[rng.choice(("../x", "model.norm.weight.mask.npy", "x.npy"))] = members.pop(name)
    else:
        members[name] += rng.randbytes(rng.choice((1, 8, 1000)))
    with zipfile.ZipFile(path, "w") as zipped:
        for key, value in members.items():
            zipped.writestr(key, bytes(value))
    return f"archive: {what}"


ALL: tuple[tuple[Mutation, int], ...] = (
    (flip_header_bits, 2),
    (flip_data_bits, 3),
    (cut_or_grow, 1),
    (header_length, 1),
    (header_field, 4),
    (config_field, 5),
    (config_regex, 1),
    (config_bytes, 1),
    (index_entry, 1),
    (lose_or_swap_files, 1),
    (archive, 1),
)


def mutate(rng: random.Random, folder: Path) -> str:
    """Change a folder in one to three ways."""
    kinds, weights = zip(*ALL, strict=True)
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = archive if (folder / "pytorch_model.bin").exists() else rng.choices(kinds, weights)[0]
        try:
            said.append(kind(rng, folder))
        except _NOTHING_LEFT:
            # An earlier change left nothing for this one to work on.
            said.append(f"{kind.__name__} found nothing")
    return "; ".join(said)
