"""sparse-bitmask in both spellings, and MaskLLM's big-endian masks."""

import numpy as np
import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors
from safetensors.torch import load_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.inspect import inspect
from converters.readers import make_reader
from converters.readers.maskllm import FILE, unpack_flat
from vllm_sparse.errors import FormatError, NumericsError

NAME = "model.layers.0.mlp.up_proj.weight"


def block(**changes) -> dict:
    sparsity = {
        "format": "sparse-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    return CONFIG | {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": sparsity | changes}
    }


def pack_bitmask(tensors: dict, strip: bool, vectors: bool = False) -> dict:
    """Every matrix packed with numpy, embeddings too, as llm-compressor did without an ignore list.

    ``vectors`` packs norms and biases as well, as its releases up to 0.3 did.
    """
    packed = {}
    for name, weight in tensors.items():
        if weight.ndim != 2 and not vectors:
            packed[name] = weight
            continue
        mask = (weight != 0).numpy()
        counts = mask.sum(-1)
        prefix = name.removesuffix(".weight") if strip else name
        packed[f"{prefix}.compressed"] = weight[torch.from_numpy(mask)]
        packed[f"{prefix}.bitmask"] = torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))
        packed[f"{prefix}.shape"] = torch.tensor(weight.shape)
        offsets = np.cumsum(counts) - counts
        packed[f"{prefix}.row_offsets"] = torch.from_numpy(offsets).reshape(counts.shape)
    return packed


@pytest.mark.parametrize("strip", [False, True])
def test_both_spellings(make_checkpoint, tmp_path, strip):
    expected = llama_tensors()
    source = make_checkpoint(tensors=pack_bitmask(expected, strip), config=block())
    reader = make_reader(open_checkpoint(source))
    assert reader.format == "sparse-bitmask"
    loaded = {entry.name: reader.load(entry).weight for entry in reader.entries()}
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert convert(source, tmp_path / "out").packed == 14
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    back = load_file(tmp_path / "dense/model.safetensors")
    assert all(torch.equal(back[name], expected[name]) for name in expected)


@pytest.mark.parametrize("strip", [False, True])
def test_packed_norms_and_biases(make_checkpoint, tmp_path, strip):
    """As llm-compressor 0.3.1 writes a model that it pruned: no tensor is stored whole."""
    expected = llama_tensors()
    if not strip:  # the other spelling does not tell a bias from a weight
        expected["model.layers.0.self_attn.q_proj.bias"] = torch.tensor([0.5, 0.0, -1.0]).repeat(16)
    source = make_checkpoint(tensors=pack_bitmask(expected, strip, vectors=True), config=block())
    reader = make_reader(open_checkpoint(source))
    loaded = {entry.name: reader.load(entry).weight for entry in reader.entries()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert inspect(source).verdict.startswith("refused: this checkpoint is stored as sparse-bitmask")
    assert convert(source, tmp_path / "out").packed == 14
    back = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(back["model.norm.weight"], expected["model.norm.weight"])


def test_unstructured_goes_to_dense_only(make_checkpoint, tmp_path):
    tensors = llama_tensors(pruned=False)
    source = make_checkpoint(
        tensors=pack_bitmask(tensors, False), config=block(sparsity_structure="unstructured")
    )
    with pytest.raises(FormatError, match="Prune it first"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "dense", to="dense")
    assert torch.equal(load_file(tmp_path / "dense/model.safetensors")[NAME], tensors[NAME])
    lying = make_checkpoint("lying", tensors=pack_bitmask(tensors, False), config=block())
    with pytest.raises(NumericsError, match="although the config says so"):
        convert(lying, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("bitmask", lambda t: t ^ 1, "bits set"),
        ("row_offsets", lambda t: t + 1, "row_offsets disagree"),
        ("shape", lambda t: t * 1000, "says"),
        ("shape", lambda t: -t, "says"),
        ("compressed", lambda t: t[:-1], "bits set"),
        ("compressed", lambda t: t.reshape(1, -1), "vector"),
        ("row_offsets", lambda t: None, "missing"),
    ],
)
def test_broken_bitmasks(make_checkpoint, tmp_path, part, change, says):
    tensors = pack_bitmask(llama_tensors(), False)
    value = change(tensors.pop(f"{NAME}.{part}"))
    if value is not None:
        tensors[f"{NAME}.{part}"] = value.contiguous()
    source = make_checkpoint(tensors=tensors, config=block())
    with pytest.raises(FormatError, match=says):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def masks_of(tensors: dict) -> dict[str, np.ndarray]:
    linears = {name: weight for name, weight in tensors.items() if "_proj" in name}
    return {f"{name}.mask": np.packbits((weight != 0).numpy()) for name, weight in linears.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maskllm(make_checkpoint, tmp_path, dtype):
    dense = llama_tensors(dtype, pruned=False)
    pruned = llama_tensors(dtype, pruned=True)
    source = make_checkpoint(tensors=dense)
    np.savez_compressed(source / FILE, **masks_of(pruned))
    report = convert(source, tmp_path / "out")
    assert report.source_format == "maskllm"
    assert report.packed == 14
    assert not (tmp_path / "out" / FILE).exists()
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    back = load_file(tmp_path / "dense/model.safetensors")
    assert all(torch.equal(back[name], pruned[name]) for name in pruned)


def test_maskllm_bits_are_big_endian_and_flat():
    assert unpack_flat(np.array([0b10010110, 0b11000000], dtype=np.uint8), (2, 5)).tolist() == [
        [True, False, False, True, False],
        [True, True, False, True, True],
    ]


def test_maskllm_that_is_broken(make_checkpoint, tmp_path):
    source = make_checkpoint(tensors=llama_tensors(pruned=False))
    good = masks_of(llama_tensors())
    key = f"{NAME}.mask"

    def refused(says, error=FormatError, **masks):
        np.savez_compressed(source / FILE, **masks)
        with pytest.raises(error, match=says):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("does not have", **good, **{"model.layers.9.mlp.up_proj.weight.mask": good[key]})
    refused("does not end in", **good, stray=good[key])
    refused("needs 768 bytes", **(good | {key: good[key][:-1]}))
    refused("unpacks to", **(good | {key: np.zeros(1 << 20, dtype=np.uint8)}))
    refused("cannot be read", **(good | {key: np.array([{}], dtype=object)}))
    refused("although the config says so", NumericsError, **(good | {key: np.full(768, 255, dtype=np.uint8)}))
    (source / FILE).write_bytes(b"not a zip")
    with pytest.raises(FormatError, match="not an npz"):
        convert(source, tmp_path / "out")
    (source / FILE).unlink()
    with pytest.raises(FormatError, match="has no mask_compressed"):
        convert(source, tmp_path / "out", format="maskllm")
