"""Training on a `datasets` stream: the same batches after a resume, the same curve, clear refusals."""

import json
from pathlib import Path

import pytest

from converters.train import loop
from converters.train.compress import compress_model
from converters.train.corpus import is_heldout
from converters.train.loop import LOG
from converters.train.streaming import StreamedBatches
from vllm_sparse.errors import FormatError

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def parquet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("parquet")
    for part in range(2):
        rows = {"text": [f"row {part * 60 + i} of a table of {i % 7} words\n" * 4 for i in range(60)]}
        parquet.write_table(pyarrow.table(rows), folder / f"train-{part}.parquet")
    return folder


def batches(folder: Path, tokenizer) -> StreamedBatches:
    return StreamedBatches(str(folder), tokenizer, 32, 4, 0.2)


def test_batches_hold_the_rows_in_order_without_those_held_out(parquet_dir: Path, tokenizer):
    stream = batches(parquet_dir, tokenizer)
    tokens = [stream.batch(i) for i in range(10)]
    assert all(batch.shape == (4, 32) for batch in tokens)
    text = tokenizer.decode([int(t) for batch in tokens for t in batch.flatten()])
    names = [f"{parquet_dir}/train/{i}" for i in range(120)]
    expected = [f"row {i} of" for i, name in enumerate(names) if not is_heldout(name, 0.2)]
    # The last line is cut off where the batches end: held-out rows depend on the name of the folder.
    whole = [line for line in text.splitlines() if "row " in line and " a table" in line]
    found = [line.partition(" a table")[0] for line in whole]
    numbers = list(dict.fromkeys(part[part.index("row ") :] for part in found))
    assert numbers == expected[: len(numbers)]
    assert len(numbers) > 10
    with pytest.raises(ValueError, match="batch 10 next, not 3"):
        stream.batch(3)


def test_a_saved_position_gives_the_same_batches_also_past_the_end(parquet_dir: Path, tokenizer):
    whole = batches(parquet_dir, tokenizer)
    first = [whole.batch(i) for i in range(3)]
    state = json.loads(json.dumps(whole.state_dict()))
    rest = [whole.batch(i) for i in range(3, 120)]
    again = batches(parquet_dir, tokenizer)
    again.load_state_dict(state)
    assert all(again.batch(i + 3).equal(batch) for i, batch in enumerate(rest))
    # The stream is shorter than that: it started again.
    assert any(first[0][0, :16].equal(batch.flatten()[s : s + 16])
               for batch in rest for s in range(batch.numel() - 16))  # fmt: skip


def tune(model: Path, data: Path, out: Path, **options):
    return compress_model(
        "finetune", model, out, str(data), quiet=True, eval_tokens=500,
        data_options={"sequence_length": 32, "stream": True, "heldout_fraction": 0.2},
        optimiser={"steps": 12, "batch_size": 4, "warmup": 2},
        run={"device": "cpu", "checkpoint_every": 4, "log_every": 2}, **options,
    )  # fmt: skip


def test_a_streamed_run_resumes_on_the_same_curve(
    trained_dir: Path, parquet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tune(trained_dir, parquet_dir, tmp_path / "one")
    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        if done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        tune(trained_dir, parquet_dir, tmp_path / "two")
    monkeypatch.setattr(loop, "_save", original)
    tune(trained_dir, parquet_dir, tmp_path / "two", resume=True)
    assert (tmp_path / "one" / LOG).read_text() == (tmp_path / "two" / LOG).read_text()


def test_a_stream_without_the_column_says_which_there_are(tmp_path: Path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "train.parquet")
    with pytest.raises(FormatError, match="no column 'text'; it has body"):
        batches(tmp_path, tokenizer).batch(0)
    parquet.write_table(pyarrow.table({"text": ["", ""]}), tmp_path / "train.parquet")
    with pytest.raises(FormatError, match="no training text"):
        StreamedBatches(str(tmp_path), tokenizer, 32, 4, 0.2).batch(0)
