import json
from pathlib import Path

import pytest
import torch

from converters.train.corpus import Document
from converters.train.models import ModelShape
from converters.train.packing import PackedBatches, encode_documents, pack_sequences, scattered
from converters.train.tokenizer import END_OF_TEXT, train_tokenizer
from vllm_sparse.errors import FormatError

ODD = "naïve  ünïcode\t\n\n  日本語 🙂 def f(x):\n    return x  # zero-width:\u200b end"


def test_any_text_survives_the_round_trip(tokenizer):
    ids = tokenizer(ODD)["input_ids"]
    assert tokenizer.decode(ids) == ODD
    assert tokenizer.eos_token_id not in ids
    assert len(tokenizer) == 300


def test_auto_tokenizer_beside_a_model_config_gives_the_same_ids(model_dir: Path, tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(model_dir)
    assert loaded(ODD)["input_ids"] == tokenizer(ODD)["input_ids"]
    assert loaded.eos_token == loaded.pad_token == END_OF_TEXT
    assert json.loads((model_dir / "config.json").read_text())["eos_token_id"] == loaded.eos_token_id


def test_training_is_reproducible(text_file: Path, tokenizer):
    again = train_tokenizer([text_file.read_text()], 300, 256)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(FormatError, match="more than 257"):
        train_tokenizer(["text"], 200)
    with pytest.raises(FormatError, match=r"only .* tokens of the 5000"):
        train_tokenizer(["just a little text"], 5000)


def test_documents_end_with_the_end_token_and_order_is_kept(tokenizer):
    documents = [Document(str(i), f"number {i}") for i in range(130)]
    stream = encode_documents(documents, tokenizer)
    assert stream.dtype == torch.int32
    text = tokenizer.decode(stream)
    assert text == "".join(f"number {i}{END_OF_TEXT}" for i in range(130))
    assert encode_documents(documents, tokenizer, max_tokens=100).tolist() == stream[:100].tolist()


def test_scattered_text_is_the_whole_text_in_pieces_of_lines(tokenizer):
    lines = "".join(f"line {i} of a document\n" for i in range(400))
    documents = [Document("a", lines), Document("b", "short"), Document("c", "x" * 700), Document("d", lines)]
    pieces = scattered(documents, 200, seed=3)
    assert pieces == scattered(documents, 200, seed=3) != scattered(documents, 200, seed=4)
    assert [p.name[0] for p in pieces] != sorted(p.name[0] for p in pieces)
    for document in documents:
        own = [p for p in pieces if p.name.partition(":")[0] == document.name]
        own.sort(key=lambda p: int(p.name.partition(":")[2] or 0))
        assert "".join(p.text for p in own) == document.text
        assert [p.ends for p in own] == [False] * (len(own) - 1) + [True]
        assert all(200 <= len(p.text) <= 400 for p in own[:-1])
    assert all(p.text.endswith("\n") for p in pieces if p.name[0] in "ad")
    ends = encode_documents(pieces, tokenizer) == tokenizer.eos_token_id
    assert ends.sum() == len(documents)


def test_batches_depend_on_seed_and_step_only_and_cover_an_epoch():
    sequences = pack_sequences(torch.arange(103), 10)
    assert sequences.shape == (10, 10)
    batches = PackedBatches(sequences, 3, seed=7)
    epoch = torch.cat([batches.batch(i) for i in range(3)])
    assert len({row[0].item() for row in epoch}) == 9
    later = batches.batch(5)
    assert torch.equal(PackedBatches(sequences, 3, seed=7).batch(5), later)
    assert not torch.equal(PackedBatches(sequences, 3, seed=8).batch(5), later)


def test_too_little_text_is_refused():
    with pytest.raises(FormatError, match="shorter than one sequence of 200"):
        pack_sequences(torch.arange(103), 200)
    with pytest.raises(FormatError, match="fewer than one batch"):
        PackedBatches(torch.zeros(2, 10), 3, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 96, "num_heads": 3, "num_kv_heads": 3}, "multiples of 64"),
        ({"num_kv_heads": 3}, "cannot share"),
        ({"head_dim": 33}, "attention kernels"),
        ({"hidden": 64}, "Extra inputs"),
    ],
)
def test_shapes_no_kernel_takes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelShape(**change)
