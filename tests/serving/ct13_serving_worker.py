"""Runs inside a process that imports compressed-tensors 0.13: packs whole checkpoints, configs included.

Started with a JSON list of jobs ``{"dense": folder, "out": folder, "type": "int"|"float"|null, "strategy":
"channel"|"tensor", "activations": null|"dynamic"|"static", "input_scale": number}``. Nothing of this
repository is imported here, so that what it writes is someone else's work. Next to each ``out`` folder,
``out``-twin gets the dense weights that the library makes of its own numbers.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskCompressor
from compressed_tensors.config import Sparse24BitMaskConfig
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


def pack(job):
    dense, out = Path(job["dense"]), Path(job["out"])
    twin_folder = Path(f"{out}-twin")
    for folder in (out, twin_folder):
        folder.mkdir(parents=True)
        shutil.copy(dense / "config.json", folder)
    tensors = load_file(dense / "model.safetensors")
    weights = {name: tensors.pop(name) for name in list(tensors) if LINEAR.match(name)}
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
    save_file({**plain, **twin}, twin_folder / "model.safetensors", metadata={"format": "pt"})
    sparsity = Sparse24BitMaskConfig(
        targets=["Linear"], ignore=IGNORE, global_sparsity=0.5, sparsity_structure="2:4"
    )
    packed = Sparse24BitMaskCompressor(config=sparsity).compress(weights)
    everything = {name: value.contiguous() for name, value in (tensors | packed).items()}
    save_file(everything, out / "model.safetensors", metadata={"format": "pt"})
    ModelCompressor(sparsity_config=sparsity, quantization_config=quantization).update_config(str(out))


if __name__ == "__main__":
    assert __version__.startswith("0.13"), __version__
    for entry in json.loads(sys.argv[1]):
        pack(entry)
