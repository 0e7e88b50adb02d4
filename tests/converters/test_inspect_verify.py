"""inspect, verify and doctor: their answers, their JSON and their exit codes."""

import json
import re
import shutil

import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from converters.cli import run
from converters.commands import parse_size
from converters.convert import convert
from converters.doctor import diagnose
from converters.inspect import inspect, sample_rows
from converters.verify import token_rows, verify
from vllm_sparse.errors import FormatError, UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pruned model, packed, as int8, and one that was never pruned."""
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(root / "pruned", llama_tensors())
    write_checkpoint(root / "full", llama_tensors(pruned=False))
    convert(root / "pruned", root / "packed")
    convert(root / "pruned", root / "int8", weights="int8")
    convert(root / "int8", root / "int8-dense", to="dense")
    return root


def test_inspect_dense_with_zeros(models):
    found = inspect(models / "pruned")
    assert found.format == "dense"
    assert found.sparsity == pytest.approx(0.5)
    linears = [layer for layer in found.layers if layer.kind == "linear"]
    assert len(linears) == 14
    assert all(layer.is_24 and layer.action == "dense" for layer in linears)
    assert "vllm-sparse convert" in found.verdict
    assert "14 linears look 2:4" in found.verdict


def test_inspect_unpruned(models):
    found = inspect(models / "full")
    assert found.sparsity == 0
    assert not any(layer.is_24 for layer in found.layers)
    assert found.verdict == "served by vLLM itself: an ordinary dense checkpoint"


def test_inspect_packed(models):
    found = inspect(models / "packed")
    assert found.format == "sparse-24-bitmask"
    assert found.bytes < found.dense_bytes == inspect(models / "pruned").bytes
    linears = [layer for layer in found.layers if layer.kind == "linear"]
    assert {layer.action for layer in linears} == {"sparse"}
    assert all(layer.backend for layer in linears)
    assert {layer.action for layer in found.layers if layer.kind != "linear"} == {"dense"}
    assert "14 linears sparse" in found.verdict
    # q, k and v are one layer to vLLM, gate and up another: the count of its log.
    assert "into 8 layers" in found.verdict


def test_inspect_structured_names_who_serves_it(tmp_path):
    own = CONFIG | {
        "architectures": ["SparseLlamaForCausalLM"],
        "per_layer_config": {"0": {"intermediate_size": CONFIG["intermediate_size"]}},
    }
    verdict = inspect(write_checkpoint(tmp_path / "s", llama_tensors(), own)).verdict
    assert verdict.startswith("served by vllm-sparse, dense; 14 linears look 2:4")


def test_inspect_says_fallback_when_config_and_data_disagree(tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 1
    sparsity = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    found = inspect(write_checkpoint(tmp_path / "x", tensors, CONFIG | {"quantization_config": block}))
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["model.layers.0.mlp.up_proj.weight"].action == "fallback"
    assert by_name["model.layers.0.mlp.gate_proj.weight"].action == "sparse"
    assert "1 falling back" in found.verdict


@pytest.mark.parametrize(
    ("ignore", "action", "verdict"),
    [
        (["lm_head", "model.layers.0.mlp.up_proj"], "dense", r"dense by config, 0 falling back"),
        (["lm_head"], "fallback", r"1 falling back"),
        (
            ["lm_head", r"re:.*layers\.0\.mlp\.(up|gate)_proj"],
            "dense",
            r"refused .*gate_proj is stored 2:4, but",
        ),
    ],
    ids=["as-announced", "unannounced", "the-other-half-announced-too"],
)
def test_inspect_half_of_a_fused_layer_dense(models, tmp_path, ignore, action, verdict):
    """As vLLM then serves or refuses it: tests/serving/test_dense_parts.py."""
    convert(models / "pruned", tmp_path / "s")
    path, name = tmp_path / "s" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    for part in ("compressed", "bitmask", "shape"):
        del tensors[f"{name}.{part}"]
    save_file({**tensors, f"{name}.weight": torch.randn(96, 64)}, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["ignore"] = ignore
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path / "s")
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name[f"{name}.weight"].action == action
    assert re.search(verdict, found.verdict), found.verdict


def test_inspect_vestigial_and_foreign(tmp_path):
    sparsity = {"format": "dense", "sparsity_structure": "0:0", "targets": ["Linear"]}
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    found = inspect(
        write_checkpoint(tmp_path / "v", llama_tensors(), CONFIG | {"quantization_config": block})
    )
    assert any("refuses" in warning for warning in found.warnings)
    assert all(layer.action == "dense" for layer in found.layers)
    awq = CONFIG | {"quantization_config": {"quant_method": "awq"}}
    found = inspect(write_checkpoint(tmp_path / "a", llama_tensors(), awq))
    assert "awq is vLLM's own" in found.verdict
    assert found.layers == ()


def test_inspect_int4(models, tmp_path):
    convert(models / "pruned", tmp_path / "int4", weights="int4")
    found = inspect(tmp_path / "int4")
    assert found.format == "sparse24"
    assert "14 linears sparse" in found.verdict
    assert {layer.dtype for layer in found.layers if layer.kind == "linear"} == {"int4"}


def test_inspect_reads_only_samples():
    weight = torch.arange(1000).unsqueeze(1).expand(1000, 4)
    rows = sample_rows(weight)[:, 0].tolist()
    assert len(rows) == 96
    assert rows[0] == 0
    assert rows[-1] == 999


def test_verify_equal(models):
    for other in ("packed", "pruned"):
        result = verify(models / "pruned", models / other)
        assert result.ok
        assert result.tensors_equal == result.tensors_checked == 21
        assert result.kl_mean == 0
        assert result.top1_agreement == 1
        assert result.positions == 512


def test_verify_quantised(models):
    result = verify(models / "pruned", models / "int8")
    assert result.ok
    assert (result.tensors_equal, result.tensors_quantized) == (7, 14)
    assert 0 < result.kl_mean < 0.1
    assert not verify(models / "pruned", models / "int8", max_kl=1e-12).ok
    twin = verify(models / "int8", models / "int8-dense", logits=False)
    assert twin.ok
    assert twin.tensors_equal == 21


def test_verify_finds_one_changed_value_and_a_missing_tensor(models, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] += 0.5
    result = verify(models / "packed", write_checkpoint(tmp_path / "x", tensors), logits=False)
    assert not result.ok
    assert result.different == ("model.layers.1.self_attn.o_proj.weight",)
    assert result.kl_mean is None
    del tensors["model.norm.weight"]
    result = verify(models / "packed", write_checkpoint(tmp_path / "y", tensors), logits=False)
    assert "model.norm.weight" in result.different


def test_verify_quantised_with_a_lost_zero_fails(models, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(models / "int8/model.safetensors")
    config = json.loads((models / "int8/config.json").read_text())
    tensors["model.layers.0.mlp.up_proj.bitmask"][0, 0] ^= 0b11
    mask = tensors["model.layers.0.mlp.up_proj.bitmask"][0, 0]
    if bin(int(mask) & 15).count("1") != 2:
        tensors["model.layers.0.mlp.up_proj.bitmask"][0, 0] ^= 0b11
        tensors["model.layers.0.mlp.up_proj.bitmask"][0, 0] ^= 0b1111
    result = verify(models / "pruned", write_checkpoint(tmp_path / "x", tensors, config), logits=False)
    assert result.different == ("model.layers.0.mlp.up_proj.weight",)


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4", "w4a8"])
def test_verify_quantised_values_without_logits(models, tmp_path, weights):
    """Rounding to nearest is half a step at most; another scale, sign or value is no rounding."""
    convert(models / "pruned", tmp_path / "q", weights=weights)
    result = verify(models / "pruned", tmp_path / "q", logits=False)
    assert result.ok
    assert result.tensors_quantized == 14
    assert 0.4 < result.max_rounding_steps < 0.505
    turned = verify(tmp_path / "q", models / "pruned", logits=False)
    assert turned.max_rounding_steps == result.max_rounding_steps
    layer = "model.layers.0.mlp.up_proj"
    for number, (part, change) in enumerate(
        {"weight_scale": lambda scale: scale * 2, "compressed": lambda values: values.flip(0)}.items()
    ):
        tensors = load_file(tmp_path / "q" / "model.safetensors")
        tensors[f"{layer}.{part}"] = change(tensors[f"{layer}.{part}"]).contiguous()
        config = json.loads((tmp_path / "q" / "config.json").read_text())
        changed = write_checkpoint(tmp_path / str(number), tensors, config)
        assert verify(models / "pruned", changed, logits=False).different == (f"{layer}.weight",)


def test_verify_a_pruned_and_quantised_model_is_not_its_dense_source(models):
    assert len(verify(models / "full", models / "int8", logits=False).different) == 14


def test_command_line_json_and_exit_codes(models, tmp_path, capsys):
    def call(*words):
        code = run([str(word) for word in words])
        return code, capsys.readouterr()

    code, out = call("inspect", models / "packed", "--json")
    assert code == 0
    assert json.loads(out.out)["schema"] == "vllm-sparse/inspect/1"
    code, out = call("verify", models / "pruned", models / "packed", "--json", "--no-logits")
    assert code == 0
    report = json.loads(out.out)
    assert report["schema"] == "vllm-sparse/verify/1"
    assert {"tensors_equal", "tensors_checked", "kl_mean", "top1_agreement", "max_abs_diff", "ok"} <= set(
        report
    )
    code, out = call("verify", models / "pruned", models / "full", "--no-logits")
    assert code == 1
    assert "failed" in out.out
    assert out.out.count("different: ") == 10
    assert "and 4 more" in out.out
    code, out = call("convert", models / "pruned", tmp_path / "c", "--json", "--weights", "fp8")
    assert code == 0
    assert json.loads(out.out)["packed"] == 14
    code, out = call("convert", models / "pruned", tmp_path / "c")
    assert code == 2
    assert out.err.count("\n") == 1
    assert "already exists" in out.err
    code, out = call("convert", models / "full", tmp_path / "d")
    assert code == 2
    assert "Traceback" not in out.err
    assert call("inspect", models / "packed")[0] == 0
    assert call("doctor", "--json")[0] in (0, 1)
    for command in ("inspect", "verify", "convert", "doctor"):
        code, out = call(command, "--help")
        assert code == 0
        assert "Example" in out.out


def test_a_broken_file_is_named_with_its_folder(models, tmp_path, capsys):
    """Of the two that verify reads, say."""
    broken = shutil.copytree(models / "pruned", tmp_path / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    assert run(["verify", str(models / "pruned"), str(broken.parent)]) == 2
    assert f"{broken}: the file is truncated" in capsys.readouterr().err


def test_prompts_file(models, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n\n")
    assert (
        run(["verify", str(models / "pruned"), str(models / "packed"), "--prompts", str(tmp_path / "p.txt")])
        == 2
    )
    assert "no prompt" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("hello\n")
    # One sentence, though transformers' message goes on after a colon and a line break.
    with pytest.raises(FormatError, match=r"no usable tokenizer; copy .* there \([^:\n]+\)$"):
        verify(models / "pruned", models / "packed", ["hello"])


def test_doctor():
    found = diagnose()
    assert found.backends["reference"] == "ready"
    assert {row.format for row in found.formats} >= {"2:4 bf16", "2:4 int8, int8 activations"}
    assert all(row.backend for row in found.formats)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 1 << 20), ("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("2k", 2000), ("3TiB", 3 << 40)],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "eight", "-1", "8 apples"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def test_an_empty_memory_limit_is_refused(models, tmp_path, capsys):
    """As a shell passes an unset variable."""
    assert run(["convert", str(models / "pruned"), str(tmp_path / "out"), "--max-memory", ""]) == 2
    assert "not a size" in capsys.readouterr().err


def test_names_with_brackets_are_printed_as_they_are(tmp_path, capsys):
    """Rich takes ``[v2]`` for a style and ``[/b]`` for its end."""
    tensors = llama_tensors() | {"model.layers.0.odd[/b].weight": torch.ones(8, 8, dtype=torch.bfloat16)}
    source = write_checkpoint(tmp_path / "model[v2]" / "x[" / "b]", tensors)
    assert run(["inspect", str(source)]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert str(source) in said
    assert "odd[/b]" in said
    plain = write_checkpoint(tmp_path / "plain", llama_tensors())
    assert run(["verify", str(plain), str(source), "--no-logits"]) == 1
    assert "different: model.layers.0.odd[/b].weight" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "gemma2", "llama"])
def test_without_tokenizer_files_tokens_are_random(tmp_path, model_type):
    """Transformers makes an empty tokenizer of some types: no tokens at all, or one for any text."""
    source = write_checkpoint(tmp_path / "src", llama_tensors(), CONFIG | {"model_type": model_type})
    (source / "tokenizer.json").unlink()
    rows, note = token_rows(source, CONFIG, ())
    assert "random" in note
    assert sum(row.numel() for row in rows) == 512
    with pytest.raises(FormatError, match="no usable tokenizer"):
        token_rows(source, CONFIG, ["hello"])


def word_tokenizer(folder, vocabulary, **kw):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, **kw))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_tokens_that_the_model_does_not_have(tmp_path):
    source = write_checkpoint(tmp_path / "src", llama_tensors())
    word_tokenizer(source, {"<unk>": 500, "def": 1, "Water": 2}, unk_token="<unk>")
    assert "random" in token_rows(source, CONFIG, ())[1]
    with pytest.raises(FormatError, match="token 500, and the model's embedding has 128 rows"):
        token_rows(source, CONFIG, ["hello"])


def test_long_prompts_end_where_the_models_positions_do(tmp_path):
    source = write_checkpoint(tmp_path / "src", llama_tensors())
    word_tokenizer(source, {"<unk>": 3, "def": 1, "Water": 2}, unk_token="<unk>")
    (row,), _ = token_rows(source, CONFIG | {"max_position_embeddings": 32}, ["word " * 100])
    assert row.numel() == 32


def test_a_tokenizer_without_a_token_for_unknown_words(tmp_path):
    source = word_tokenizer(write_checkpoint(tmp_path / "src", llama_tensors()), {"a": 0})
    assert "random" in token_rows(source, CONFIG, ())[1]


def test_a_tokenizers_own_code_is_not_run(tmp_path, monkeypatch):
    """Not even when the user, asked by transformers, says yes."""
    source = write_checkpoint(tmp_path / "src", llama_tensors())
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "random" in token_rows(source, CONFIG, ())[1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "nope"),
        ("num_hidden_layers", "2"),
        ("vocab_size", "x"),
        ("text_config", [1]),
        ("rope_scaling", {"type": "nope"}),
        ("dtype", "nope"),
    ],
)
def test_verify_refuses_configs_that_transformers_cannot_take(tmp_path, capsys, key, value):
    source = write_checkpoint(tmp_path / "src", llama_tensors(), CONFIG | {key: value})
    assert run(["verify", str(source), str(source)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
