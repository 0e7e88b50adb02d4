import sys
import types
from pathlib import Path

import pytest

from converters.train.corpus import load_corpus, read_documents
from converters.train.packing import encode_documents
from vllm_sparse.errors import FormatError, UnsupportedError


def test_stdlib_is_split_by_file_and_reproducible():
    first, second = load_corpus(max_bytes=300_000), load_corpus(max_bytes=300_000)
    assert first == second
    train, heldout = {d.name for d in first.train}, {d.name for d in first.heldout}
    assert train
    assert heldout
    assert not train & heldout
    assert not any("/test/" in name or "site-packages" in name for name in train | heldout)
    assert 300_000 <= sum(len(d.text) for d in first.train) < 1_000_000


def test_a_document_never_changes_sides_when_others_come(tmp_path: Path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text("some words " * 20)
    before = load_corpus(str(tmp_path), heldout_fraction=0.3)
    for index in range(40, 60):
        (tmp_path / f"{index}.txt").write_text("some words " * 20)
    after = load_corpus(str(tmp_path), heldout_fraction=0.3)
    assert {d.name for d in before.heldout} <= {d.name for d in after.heldout}
    assert {d.name for d in before.train} <= {d.name for d in after.train}


def test_one_file_is_cut_at_a_line_and_nothing_is_lost(text_file: Path):
    corpus = load_corpus(str(text_file), heldout_fraction=0.1)
    (train,), (heldout,) = corpus.train, corpus.heldout
    assert train.text + heldout.text == text_file.read_text()
    assert train.text.endswith("\n")
    assert len(heldout.text) == pytest.approx(0.1 * text_file.stat().st_size, rel=0.05)


def test_reading_without_a_split_takes_the_whole_file(text_file: Path):
    (document,) = read_documents(str(text_file))
    assert document.text == text_file.read_text()


def test_bad_sources_are_explained(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(FormatError, match="holds no text files"):
        load_corpus(str(tmp_path))
    binary = tmp_path / "data.txt"
    binary.write_bytes(b"abc\xff\xfe\n" * 100)
    with pytest.raises(FormatError, match="not UTF-8 text"):
        load_corpus(str(binary))
    for read in (load_corpus, read_documents):
        for absent in (str(tmp_path / "absent.txt"), "~no-such-user/a.txt"):
            with pytest.raises(FormatError, match="no such file"):
                read(absent)
        # A path for its ending; a dataset's name would be looked up on the hub.
        with pytest.raises(FormatError, match="no such file"):
            read("notes-that-are-not-here.txt")
        with pytest.raises(FormatError, match="no text is named"):
            read("")
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    with pytest.raises(FormatError, match="give more text"):
        load_corpus(str(short))


def test_dataset_name_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vllm-sparse\[train\]'"):
        load_corpus("Salesforce/wikitext:wikitext-2-raw-v1")


def test_dataset_rows_keep_their_own_split(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(name, config, streaming):
        calls.append((name, config, streaming))
        return {
            "train": [{"body": f"train row {i} " * 20} for i in range(50)],
            "test": [{"body": f"test row {i} " * 20} for i in range(50)],
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = load_corpus("owner/set:english:body", max_bytes=2000)
    assert calls == [("owner/set", "english", True)]
    assert all(d.text.startswith("train row") for d in corpus.train)
    assert all(d.text.startswith("test row") for d in corpus.heldout)
    assert 2000 <= sum(len(d.text) for d in corpus.train) < 2400
    with pytest.raises(FormatError, match="no column 'text'; it has body"):
        load_corpus("owner/set:english")


class Rows:
    """A streamed split that counts what is read of it."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.read = name, count, 0

    def __iter__(self):
        for i in range(self.count):
            self.read += 1
            yield {"text": f"{self.name} row {i}"}


def test_evaluation_reads_no_more_of_a_dataset_than_it_needs(monkeypatch: pytest.MonkeyPatch, tokenizer):
    splits = {"train": Rows("train", 10_000), "validation": Rows("validation", 10_000)}
    fake = types.SimpleNamespace(load_dataset=lambda *_, **__: splits)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    stream = encode_documents(read_documents("owner/set"), tokenizer, 100)
    assert len(stream) == 100
    assert tokenizer.decode(stream).startswith("validation row 0")
    assert splits["train"].read == 0
    assert splits["validation"].read <= 32
    del splits["validation"]
    assert len(encode_documents(read_documents("owner/set"), tokenizer, 100)) == 100
    assert 0 < splits["train"].read < 2000
    # The same rows as a corpus holds out.
    held = [document.name for document in read_documents("owner/set")]
    assert held == [document.name for document in load_corpus("owner/set").heldout]


def test_the_real_datasets_library_reads_parquet(tmp_path: Path):
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"text": [f"row {i} of a table " * 10 for i in range(200)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    corpus = load_corpus(str(tmp_path), heldout_fraction=0.2)
    assert len(corpus.train) + len(corpus.heldout) == 200
    assert 20 <= len(corpus.heldout) <= 60
