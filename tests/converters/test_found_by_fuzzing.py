"""Inputs that once crashed or hung, found by `make fuzz`: each is one clear message now."""

import json
import struct

import numpy as np
import pytest
from checkpoint_maker import CONFIG, llama_tensors, write_checkpoint

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.inspect import inspect
from vllm_sparse.errors import FormatError
from vllm_sparse.quantization.matching import LayerPatterns


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("re:.{1000000000}", "repetitions"),
        ("re:((a{100}){100}){100}", "repetitions"),
        ("re:a{,99999999999999999999999999}", "repetitions"),
        ("re:" + "(" * 500, "invalid regular expression"),
        ("re:[", "invalid regular expression"),
        ("re:" + "a" * 600, "600 characters"),
    ],
)
def test_patterns_that_are_costly_to_compile(pattern, says):
    with pytest.raises(FormatError, match=says):
        LayerPatterns([pattern], "ignore")


def test_ordinary_counts_stay_allowed():
    assert LayerPatterns([r"re:model\.layers\.\d{1,3}\.mlp"], "ignore").matches_name("model.layers.12.mlp")


@pytest.mark.parametrize("key", ["model_type", "dtype", "architectures"])
@pytest.mark.parametrize("value", [[], {}, 3, None, [[]]])
def test_config_values_of_the_wrong_type(tmp_path, key, value):
    source = write_checkpoint(tmp_path / "src", llama_tensors(), CONFIG | {key: value})
    assert inspect(source).format == "dense"
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("metadata", ["", 0, [], False, {"format": 1}, {"format": None}])
def test_metadata_that_is_no_object_of_strings(tmp_path, metadata):
    source = write_checkpoint(tmp_path / "src", llama_tensors())
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": metadata}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    with pytest.raises(FormatError, match="__metadata__ is not a JSON object of strings"):
        open_checkpoint(source)


def test_a_mask_that_is_not_an_array(tmp_path):
    import zipfile

    source = write_checkpoint(tmp_path / "src", llama_tensors(pruned=False))
    name = "model.layers.0.mlp.up_proj.weight.mask"
    np.savez(source / "mask_compressed.npz", **{name: np.zeros(768, np.uint8)})
    with zipfile.ZipFile(source / "mask_compressed.npz", "w") as archive:
        archive.writestr(f"{name}.npy", b"not an array")
    with pytest.raises(FormatError, match="is not a numpy array"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
