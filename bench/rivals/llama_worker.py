"""llama.cpp's side of the comparison: a program of its own, run by an interpreter that has llama-cpp-python.

    PYTHON llama_worker.py write DENSE_FOLDER MODEL.gguf bf16|q8_0|q4_0
    PYTHON llama_worker.py serve MODEL.gguf THREADS

``write`` needs gguf and numpy and makes the linears of a bf16 checkpoint what the format says; the embedding,
which is also the head, stays bf16 as it does in the checkpoints that it is compared with. ``serve`` answers
lines ``{"batch": B, "prompt": P, "tokens": T}`` on standard input with times in milliseconds. It calls the
low-level API (one decode call for all sequences, greedy choice by numpy) and no server, which favours it.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MOST_TOKENS = 1024


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and bf16 bit patterns of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def _float32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write(folder: Path, target: Path, kind: str) -> None:
    """A llama GGUF of the checkpoint in ``folder``, without a vocabulary.

    Rows of q and k are not reordered for llama.cpp's rotary layout: the weights are random.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    types = gguf.GGMLQuantizationType
    for name, bits in _tensors(folder / "model.safetensors"):
        if bits.ndim == 1:
            writer.add_tensor(_gguf_name(name), _float32(bits))
        elif kind == "bf16" or "embed_tokens" in name:
            writer.add_tensor(_gguf_name(name), bits.view(np.uint8), raw_dtype=types.BF16)
        else:
            wanted = types[kind.upper()]
            writer.add_tensor(
                _gguf_name(name), gguf.quants.quantize(_float32(bits), wanted), raw_dtype=wanted
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


class Session:
    """A model in llama.cpp with room for 32 sequences."""

    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 32 * 128
        settings.n_batch = settings.n_ubatch = MOST_TOKENS
        settings.n_seq_max = 32
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(MOST_TOKENS, 0, 1)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, rows: list[tuple[int, int, int, bool]]) -> Any:
        """Decode ``(token, position, sequence, wants logits)`` rows; greedy tokens of those that want."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = int(wanted)
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        out = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = self.api.llama_get_logits_ith(self.context, i)
                out.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
        return out

    def measure(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Prefill ``batch`` prompts one after the other, then ``tokens`` decode steps for all of them."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        generator = np.random.default_rng(0)
        current, prefills = [], []
        for sequence in range(batch):
            ids = generator.integers(0, self.vocab, prompt).tolist()
            start = time.perf_counter()
            rows = [(token, at, sequence, at == prompt - 1) for at, token in enumerate(ids)]
            current += self.step(rows)
            prefills.append((time.perf_counter() - start) * 1e3)
        steps = []
        for at in range(prompt, prompt + tokens):
            start = time.perf_counter()
            current = self.step([(token, at, sequence, True) for sequence, token in enumerate(current)])
            steps.append((time.perf_counter() - start) * 1e3)
        return {"prefill_ms": prefills, "step_ms": steps}


def serve(model: Path, threads: int) -> None:
    """Answer requests until standard input ends."""
    session = Session(model, threads)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(session.measure(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        serve(Path(sys.argv[2]), int(sys.argv[3]))
