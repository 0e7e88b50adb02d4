"""Text to train, calibrate and evaluate on, split into training and held-out documents.

Sources, in the order they are tried:

- ``stdlib``: the source code and docstrings of the running Python's standard library. Real text that
  is on every machine, in an order that depends on nothing but the file names.
- a path: one text file (split at a line near the end), a directory of text files (split by file), or a
  directory of ``*.parquet`` files, read by the `datasets` library;
- anything else: a name for the `datasets` library, ``NAME[:CONFIG[:COLUMN]]``.
"""

import hashlib
import importlib
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.errors import FormatError, UnsupportedError

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
TEXT_SUFFIXES = frozenset(
    {
        *(".txt", ".md", ".rst", ".tex", ".html", ".csv", ".json", ".jsonl"),
        *(
            ".py",
            ".pyi",
            ".c",
            ".h",
            ".cc",
            ".cpp",
            ".hpp",
            ".js",
            ".ts",
            ".java",
            ".go",
            ".rs",
            ".rb",
            ".sh",
        ),
    }
)
# Tests repeat each other, codec tables and demos are hardly text; site-packages is not the library.
_STDLIB_SKIPPED = frozenset(
    {
        *("site-packages", "dist-packages", "ensurepip", "encodings"),
        *("test", "tests", "idle_test", "turtledemo", "__pycache__"),
    }
)
_MIN_BYTES = 256
_HELDOUT_FRACTION = 0.05


@dataclass(frozen=True)
class Document:
    """One piece of text and where it came from.

    Attributes:
        name: unique in its source.
        text: of any length.
        ends: False for a piece that its document goes on after; no end token follows it.
    """

    name: str
    text: str
    ends: bool = True


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split so that no held-out document was trained on."""

    source: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]

    def summary(self) -> str:
        """One line: documents and megabytes on each side."""
        parts = [
            f"{len(side)} {name} documents ({sum(len(d.text) for d in side) / 1e6:.1f} MB)"
            for name, side in (("training", self.train), ("held-out", self.heldout))
        ]
        return f"{self.source}: " + ", ".join(parts)


def load_corpus(
    source: str = STDLIB, heldout_fraction: float = _HELDOUT_FRACTION, max_bytes: int | None = None
) -> Corpus:
    """Read and split a source.

    Args:
        source: ``stdlib``, a path, or a `datasets` name (see the module's text).
        heldout_fraction: share held out, decided per document by a hash of its name, so that adding a
            document never moves another one across the split.
        max_bytes: stop reading each side after about this many characters.

    Raises:
        FormatError: the path holds no readable text, or too little of it.
        UnsupportedError: a `datasets` name without that library, or one it cannot load.
    """
    if not 0.0 < heldout_fraction < 1.0:
        raise FormatError(f"heldout_fraction is {heldout_fraction}; it must lie between 0 and 1")
    path = _path(source)
    if source == STDLIB:
        corpus = _split_by_name(source, _stdlib_documents(), heldout_fraction, max_bytes)
    elif path.is_file():
        corpus = _split_one(path, heldout_fraction, max_bytes)
    elif path.is_dir() and any(path.glob("**/*.parquet")):
        corpus = _from_datasets(source, heldout_fraction, max_bytes)
    elif path.is_dir():
        corpus = _split_by_name(source, _directory_documents(path), heldout_fraction, max_bytes)
    elif _names_a_file(source):
        raise FormatError(
            f"no such file or directory: {source}. Give a text file, a directory or a dataset name."
        )
    else:
        corpus = _from_datasets(source, heldout_fraction, max_bytes)
    for side, documents in (("training", corpus.train), ("held-out", corpus.heldout)):
        if sum(len(d.text) for d in documents) < _MIN_BYTES:
            raise FormatError(
                f"{source}: the {side} part has {len(documents)} documents, under {_MIN_BYTES} characters; "
                "give more text or another held-out fraction"
            )
    return corpus


def read_documents(source: str) -> Iterable[Document]:
    """All documents of a path, unsplit; of ``stdlib`` and datasets the held-out part.

    Rows of a dataset come one by one: what is not asked for is not read, and no training split beside a
    held-out one is.
    """
    path = _path(source)
    if source == STDLIB:
        return load_corpus(source).heldout
    if path.is_file():
        return (Document(path.name, _read_file(path)),)
    if path.is_dir() and not any(path.glob("**/*.parquet")):
        return tuple(_directory_documents(path))
    if not path.is_dir() and _names_a_file(source):
        return load_corpus(source).heldout  # refuses it
    train, heldout = _dataset_sides(source)
    if heldout is not None:
        return heldout
    return (document for document in train if is_heldout(document.name, _HELDOUT_FRACTION))


def _path(source: str) -> Path:
    """``source`` as a path, which need not be there.

    Raises:
        FormatError: it is empty, as an unset variable is, or names the home of an unknown user.
    """
    if not source:
        raise FormatError("no text is named: give stdlib, a text file, a directory or a dataset name")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise FormatError(f"no such file or directory: {source} ({error})") from error


def _names_a_file(source: str) -> bool:
    """Whether a source that is not there was meant as a path, not as a dataset's name."""
    return source.startswith((".", "/", "~")) or Path(source).suffix.lower() in TEXT_SUFFIXES


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out; depends on nothing else."""
    return _hash("split:" + name) < fraction * 2**64


def _stdlib_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not _STDLIB_SKIPPED.intersection(path.relative_to(root).parts) and path.stat().st_size > 0
    ]
    if not files:
        raise UnsupportedError(
            f"no library sources under {root}; give a text file, a directory or a dataset name"
        )
    yield from _read_files(root, files)


def _directory_documents(root: Path) -> Iterator[Document]:
    files = [path for path in root.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    if not files:
        raise FormatError(f"{root} holds no text files; looked for {', '.join(sorted(TEXT_SUFFIXES))}")
    yield from _read_files(root, files)


def _read_files(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    """Documents in the order of a hash of their names, which mixes neighbouring folders."""
    named = sorted(
        ((p.relative_to(root).as_posix(), p) for p in files), key=lambda item: (_hash(item[0]), item[0])
    )
    for name, path in named:
        try:
            yield Document(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            logger.warning("skipped %s: not UTF-8 text", path)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def _split_by_name(
    source: str, documents: Iterable[Document], heldout_fraction: float, max_bytes: int | None
) -> Corpus:
    train: list[Document] = []
    heldout: list[Document] = []
    sizes = [0, 0]
    for document in documents:
        held = is_heldout(document.name, heldout_fraction)
        side = heldout if held else train
        if max_bytes is None or sizes[held] < max_bytes:
            side.append(document)
            sizes[held] += len(document.text)
        elif min(sizes) >= max_bytes:
            break
    return Corpus(source, tuple(train), tuple(heldout))


def _split_one(path: Path, heldout_fraction: float, max_bytes: int | None) -> Corpus:
    text = _read_file(path)[:max_bytes]
    if not text.strip():
        raise FormatError(f"{path} is empty; give a file with text")
    cut = text.rfind("\n", 0, int(len(text) * (1.0 - heldout_fraction))) + 1
    if cut == 0:
        raise FormatError(
            f"{path} has no line break before its last {heldout_fraction:.0%}, where its held-out part is "
            "cut off; give a text of several lines, or a larger data.heldout_fraction"
        )
    name = path.name
    return Corpus(str(path), (Document(name, text[:cut]),), (Document(name + ":heldout", text[cut:]),))


def _from_datasets(source: str, heldout_fraction: float, max_bytes: int | None) -> Corpus:
    """Use the dataset's own validation or test split when it has one, else split by row."""
    train, heldout = _dataset_sides(source)
    if heldout is None:
        return _split_by_name(source, train, heldout_fraction, max_bytes)
    return Corpus(source, tuple(_take(train, max_bytes)), tuple(_take(heldout, max_bytes)))


def _dataset_sides(source: str) -> tuple[Iterator[Document], Iterator[Document] | None]:
    """Rows of a dataset's train split, and of its validation or test split when it has one."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UnsupportedError(
            f"{source!r} is neither 'stdlib' nor an existing path, so it is taken as a dataset name, and the "
            "`datasets` library is not installed: pip install 'vllm-sparse[train]'"
        ) from error
    name, config, column = parse_dataset_name(source)
    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"{source!r} is neither 'stdlib' nor an existing path, and the `datasets` library cannot load a "
            f"dataset of that name: {error}"
        ) from error
    if "train" not in splits:
        raise FormatError(f"dataset {name!r} has no train split; it has {', '.join(splits)}")
    other = next((s for s in ("validation", "test") if s in splits), None)
    train = _rows(splits["train"], f"{name}/train", column)
    return train, None if other is None else _rows(splits[other], f"{name}/{other}", column)


def parse_dataset_name(source: str) -> tuple[str, str | None, str]:
    """Name (or folder of parquet files), configuration and text column of a `datasets` source."""
    if Path(source).is_dir():
        return source, None, "text"
    name, _, rest = source.partition(":")
    config, _, column = rest.partition(":")
    return name, config or None, column or "text"


def _rows(split: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[Document]:
    for index, row in enumerate(split):
        if column not in row:
            raise FormatError(
                f"{name} has no column {column!r}; it has {', '.join(row)}. Name one: NAME:CONFIG:COLUMN"
            )
        if row[column]:
            yield Document(f"{name}/{index}", str(row[column]))


def _take(documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    size = 0
    for document in documents:
        yield document
        size += len(document.text)
        if max_bytes is not None and size >= max_bytes:
            return
