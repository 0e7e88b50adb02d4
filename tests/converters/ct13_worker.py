"""Runs inside a process that imports compressed-tensors 0.13: does the jobs of a JSON file.

A job is ``{"do": name, "in": safetensors, "out": safetensors, ...}``. Nothing of this repository is
imported here, so that what it writes is someone else's work.
"""

import json
import sys

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import Marlin24Compressor, ModelCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import load_file, save_file


def read_json(path):
    with open(path) as file:
        return json.load(file)


def contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def compress24(job, tensors):
    return Sparse24BitMaskCompressor(config=Sparse24BitMaskConfig()).compress(tensors)


def decompress24(job, tensors):
    return dict(Sparse24BitMaskCompressor(config=Sparse24BitMaskConfig()).decompress(job["in"]))


def bitmask(job, tensors):
    return BitmaskCompressor(config=BitmaskConfig()).compress(tensors)


def marlin24(job, tensors):
    """Packed tensors, and under ``M.expected`` the numbers they stand for."""
    group = job["group_size"]
    args = QuantizationArgs(
        num_bits=job["bits"],
        type="int",
        symmetric=True,
        strategy="group" if group else "channel",
        group_size=group,
    )
    state, schemes, expected = {}, {}, {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        rows, cols = weight.shape
        groups = weight.float().reshape(rows, -1, group or cols)
        scale = (groups.abs().amax(-1) / (2 ** (job["bits"] - 1) - 1)).to(torch.float16)
        state |= {name: weight, f"{module}.weight_scale": scale}
        schemes[module] = QuantizationScheme(targets=["Linear"], weights=args)
        numbers = quantize(x=weight.to(torch.float16), scale=scale, zero_point=None, args=args)
        expected[f"{module}.expected"] = dequantize(numbers.float(), scale.float(), None, args=args)
    return Marlin24Compressor().compress(state, names_to_scheme=schemes) | expected


def load_model(job, tensors):
    """A whole checkpoint folder decompressed into a transformers model by the library itself."""
    import transformers

    folder = job["folder"]
    block = read_json(f"{folder}/config.json")["quantization_config"]
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ModelCompressor.from_compression_config(block).decompress(folder, model)
    return {name: value for name, value in model.state_dict().items() if name.endswith("_proj.weight")}


def parse_config(job, tensors):
    """The library accepts the block and finds in it what it would have written."""
    block = read_json(job["config"])["quantization_config"]
    found = ModelCompressor.from_compression_config(block)
    assert found.sparsity_config.format == "sparse-24-bitmask"
    assert (found.quantization_config is not None) == job["quantized"]
    return {}


JOBS = {job.__name__: job for job in (compress24, decompress24, bitmask, marlin24, load_model, parse_config)}

if __name__ == "__main__":
    assert __version__.startswith("0.13"), __version__
    for entry in read_json(sys.argv[1]):
        result = JOBS[entry["do"]](entry, load_file(entry["in"]) if "in" in entry else {})
        if "out" in entry:
            save_file(contiguous(result), entry["out"])
