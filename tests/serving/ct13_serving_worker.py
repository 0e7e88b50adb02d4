"""Runs inside a process that imports compressed-tensors 0.13: packs whole checkpoints, configs included.

Started with a JSON list of jobs ``{"dense": folder, "out": folder, "type": "int"|"float"|null, "strategy":
"channel"|"tensor", "activations": null|"dynamic"|"static", "input_scale": number}``. Nothing of this
repository is imported here, so that what it writes is someone else's work. Next to each ``out`` folder,
``out``-twin gets the dense weights that the library makes of its own numbers. A job with
``{"dense", "out", "packing": "marlin-24"|"sparse-bitmask", "bits", "group_size"}`` makes a checkpoint of
one of the formats that have to be converted before they are served.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import Marlin24Compressor, ModelCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r".*layers\.\d+\..*(_proj|\.w[123])\.weight$")
IGNORE = ["lm_head", r"re:.*\.gate$"]
LIMITS = {"int": 127.0, "float": 448.0}


def quantised(job, weights):
    """The library's numbers, their scales, and the dense weights they stand for."""
    args = QuantizationArgs(num_bits=8, type=job["type"], strategy=job["strategy"], symmetric=True)
    dtype = torch.int8 if job["type"] == "int" else torch.float8_e4m3fn
    numbers, scales, twin = {}, {}, {}
    for name, weight in weights.items():
        weight = weight.float()
        amax = weight.abs().amax(1, keepdim=True) if job["strategy"] == "channel" else weight.abs().amax()
        scale = (amax / LIMITS[job["type"]]).clamp_min(1e-8)
        scale = scale if scale.ndim else scale.reshape(1)
        numbers[name] = quantize(x=weight, scale=scale, zero_point=None, args=args, dtype=dtype)
        twin[name] = dequantize(numbers[name].to(torch.float32), scale, None, args=args).float()
        scales[f"{name.removesuffix('.weight')}.weight_scale"] = scale
    return numbers, scales, twin


def scheme(job):
    common = {"num_bits": 8, "type": job["type"], "symmetric": True}
    inputs = {
        None: None,
        "dynamic": QuantizationArgs(**common, strategy="token", dynamic=True),
        "static": QuantizationArgs(**common, strategy="tensor", dynamic=False),
    }[job["activations"]]
    weights = QuantizationArgs(**common, strategy=job["strategy"])
    return QuantizationConfig(
        config_groups={
            "group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        },
        format="int-quantized" if job["type"] == "int" else "float-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=IGNORE,
    )


def save(tensors, folder):
    everything = {name: value.contiguous() for name, value in tensors.items()}
    save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})


def prepare(job):
    """The job's folders, the tensors that stay as they are, and the linears' weights."""
    dense, out = Path(job["dense"]), Path(job["out"])
    twin_folder = Path(f"{out}-twin")
    for folder in (out, twin_folder):
        folder.mkdir(parents=True)
        shutil.copy(dense / "config.json", folder)
    tensors = load_file(dense / "model.safetensors")
    weights = {name: tensors.pop(name) for name in list(tensors) if LINEAR.match(name)}
    return out, twin_folder, tensors, weights


def pack_to_convert(job):
    out, twin_folder, tensors, weights = prepare(job)
    if job["packing"] == "marlin-24":
        packed, twin, quantization = marlin24(job, weights)
        compressor = ModelCompressor(quantization_config=quantization)
    else:
        sparsity = BitmaskConfig(targets=["Linear"], ignore=IGNORE, sparsity_structure="unstructured")
        packed, twin = BitmaskCompressor(config=sparsity).compress(weights), weights
        compressor = ModelCompressor(sparsity_config=sparsity)
    save(tensors | twin, twin_folder)
    save(tensors | packed, out)
    compressor.update_config(str(out))


def marlin24(job, weights):
    """Packed tensors, the numbers they stand for, and the config."""
    group = job["group_size"]
    args = QuantizationArgs(
        num_bits=job["bits"],
        type="int",
        symmetric=True,
        strategy="group" if group else "channel",
        group_size=group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state, schemes, twin = {}, {}, {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        rows, cols = weight.shape
        groups = weight.float().reshape(rows, -1, group or cols)
        scale = (groups.abs().amax(-1) / (2 ** (job["bits"] - 1) - 1)).to(torch.float16)
        state |= {name: weight, f"{module}.weight_scale": scale}
        schemes[module] = scheme
        numbers = quantize(x=weight.to(torch.float16), scale=scale, zero_point=None, args=args)
        twin[name] = dequantize(numbers.float(), scale.float(), None, args=args)
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="marlin-24",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=IGNORE,
    )
    return Marlin24Compressor().compress(state, names_to_scheme=schemes), twin, quantization


def pack(job):
    out, twin_folder, tensors, weights = prepare(job)
    quantization, twin = None, weights
    if job["type"]:
        weights, scales, twin = quantised(job, weights)
        tensors |= scales
        quantization = scheme(job)
        if job["activations"] == "static":
            for name in weights:
                value = torch.tensor([job["input_scale"]])
                tensors[f"{name.removesuffix('.weight')}.input_scale"] = value
    plain = {name: value for name, value in tensors.items() if not name.endswith("_scale")}
    save(plain | twin, twin_folder)
    sparsity = Sparse24BitMaskConfig(
        targets=["Linear"], ignore=IGNORE, global_sparsity=0.5, sparsity_structure="2:4"
    )
    packed = Sparse24BitMaskCompressor(config=sparsity).compress(weights)
    save(tensors | packed, out)
    ModelCompressor(sparsity_config=sparsity, quantization_config=quantization).update_config(str(out))


if __name__ == "__main__":
    assert __version__.startswith("0.13"), __version__
    for entry in json.loads(sys.argv[1]):
        (pack_to_convert if "packing" in entry else pack)(entry)
