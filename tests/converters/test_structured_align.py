"""``convert --align N``: exact where channels are zero, closer to the unpruned model where they come back."""

import json

import pytest
import torch
from checkpoint_maker import HIDDEN, write_checkpoint
from safetensors.torch import load_file, save_file
from test_structured import BASE, four_layers, logits, pruned

from converters.cli import run
from converters.convert import convert
from converters.verify import verify
from vllm_sparse.errors import UserError


def best_channels(tensors: dict, layer: int, count: int) -> torch.Tensor:
    """The channels a pruning by magnitude keeps, computed from the definition."""
    gate, up, down = (tensors[f"model.layers.{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    norms = (gate**2).sum(1) + (up**2).sum(1) + (down**2).sum(0)
    return norms.argsort(descending=True)[:count].sort().values


def keep_channels(tensors: dict, layer: int, kept: torch.Tensor) -> None:
    for part in ("gate", "up"):
        name = f"model.layers.{layer}.mlp.{part}_proj.weight"
        tensors[name] = tensors[name][kept].contiguous()
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, kept].contiguous()


def test_zero_padding_is_exact_and_its_cost_is_reported(tmp_path):
    source = write_checkpoint(tmp_path / "src", pruned(), BASE)
    report = convert(source, tmp_path / "out", to="structured", align=32)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_config"]["0"] == {"intermediate_size": 64}
    assert report.notes[0].startswith(f"--align 32 adds {16 * 3 * HIDDEN} parameters (")
    assert report.notes[1].startswith("layer 0: width 48 to 64 with 16 zero channels")
    convert(source, tmp_path / "plain", to="structured")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "plain"))
    down = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == (HIDDEN, 64)
    assert not down[:, 48:].any()
    found = verify(tmp_path / "plain", tmp_path / "out")
    assert (found.ok, found.tensors_padded, found.different) == (True, 3, ())
    assert found.tensors_equal == found.tensors_checked - 3


def test_added_channels_that_are_not_zero_are_different(tmp_path):
    source = write_checkpoint(tmp_path / "src", pruned(), BASE)
    convert(source, tmp_path / "out", to="structured", align=32)
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, -1] = 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    found = verify(source, tmp_path / "out", logits=False)
    assert (found.ok, found.tensors_padded) == (False, 2)
    assert found.different == ("model.layers.0.mlp.down_proj.weight",)


def test_widths_that_fit_stay(tmp_path):
    source = write_checkpoint(tmp_path / "src", pruned(), BASE)
    report = convert(source, tmp_path / "out", to="structured", align=16)
    assert report.notes[0].startswith("--align 16 adds 0 parameters (0.00 % of the model) to 0 of 4 layers")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written["model.layers.0.mlp.up_proj.weight"].shape[0] == 48


def test_readmitted_channels_are_the_best_removed_ones(tmp_path):
    """Cut to 40 channels by magnitude and aligned to 64, a layer is the one cut to 64 by magnitude."""
    dense = four_layers()
    dense_folder = write_checkpoint(tmp_path / "dense", dense, BASE)
    cut, wanted = four_layers(), four_layers()
    for layer, count in ((0, 40), (2, 33)):
        keep_channels(cut, layer, best_channels(dense, layer, count))
        keep_channels(wanted, layer, best_channels(dense, layer, 64))
    source = write_checkpoint(tmp_path / "src", cut, BASE)
    report = convert(source, tmp_path / "out", to="structured", align=32, dense=dense_folder)
    assert "with the best 24 removed channels" in report.notes[1]
    direct = write_checkpoint(tmp_path / "direct", wanted, BASE)
    convert(direct, tmp_path / "wanted", to="structured")
    assert json.loads((tmp_path / "out/config.json").read_text())["per_layer_config"] == {
        "0": {"intermediate_size": 64},
        "2": {"intermediate_size": 64},
    }
    # The same channels in another order.
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "wanted"), rtol=0, atol=1e-5)


def test_readmission_finds_layers_that_were_renumbered(tmp_path):
    dense = four_layers()
    dense_folder = write_checkpoint(tmp_path / "dense", dense, BASE)
    cut = {n: t for n, t in four_layers().items() if not n.startswith("model.layers.1.")}
    keep_channels(cut, 3, best_channels(dense, 3, 50))
    source = write_checkpoint(tmp_path / "src", cut, BASE | {"num_hidden_layers": 3})
    report = convert(source, tmp_path / "out", to="structured", align=64, dense=dense_folder)
    # Layers that lost nothing have nothing to take back.
    assert "layer 0: width 96 to 128 with 32 zero channels" in report.notes[1]
    written = load_file(tmp_path / "out/model.safetensors")["model.layers.2.mlp.gate_proj.weight"]
    whole = dense["model.layers.3.mlp.gate_proj.weight"]
    assert len(written) == 64
    kept = best_channels(dense, 3, 64)
    assert torch.equal(written.sort(0).values, whole[kept].sort(0).values)


def test_zeros_fill_what_was_never_there(tmp_path):
    dense_folder = write_checkpoint(tmp_path / "dense", four_layers(), BASE)
    source = write_checkpoint(tmp_path / "src", pruned(), BASE)
    report = convert(source, tmp_path / "out", to="structured", align=128, dense=dense_folder)
    assert "width 48 to 128 with the best 48 removed channels and 32 zero channels" in report.notes[1]
    written = load_file(tmp_path / "out/model.safetensors")
    assert not written["model.layers.0.mlp.down_proj.weight"][:, 96:].any()
    whole = four_layers()
    for name in [n for n in whole if n.startswith("model.layers.0.")]:
        kept = (
            written[name][:96]
            if "gate" in name or "up" in name
            else written[name][:, :96]
            if "down" in name
            else None
        )
        if kept is not None:
            assert torch.equal(kept, whole[name])


def test_readmission_is_refused_where_it_would_be_wrong(tmp_path):
    dense = four_layers()
    dense_folder = write_checkpoint(tmp_path / "dense", dense, BASE)

    def refused(tensors: dict, says: str, align: int = 32, dense=dense_folder) -> None:
        source = write_checkpoint(tmp_path / "src", tensors, BASE)
        with pytest.raises(UserError, match=says):
            convert(source, tmp_path / "out", to="structured", align=align, dense=dense)
        assert not (tmp_path / "out").exists()

    trained = pruned()
    trained["model.layers.0.mlp.gate_proj.weight"][3, 3] += 1
    refused(trained, "layer 0: its gate_proj is no selection of rows")
    flap = pruned()
    flap["model.layers.0.mlp.down_proj.bias"] = torch.ones(HIDDEN)
    refused(flap, "layer 0 has a bias that stands for its removed channels")
    packed = {n: t for n, t in dense.items() if n != "model.layers.2.mlp.up_proj.weight"}
    other = write_checkpoint(tmp_path / "packed", packed, BASE)
    refused(pruned(), "has no model.layers.2.mlp.up_proj.weight", dense=other)
    other = write_checkpoint(tmp_path / "other", dense, BASE | {"hidden_size": 128})
    refused(pruned(), "not the unpruned model", dense=other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "structured", "align": -8}, "--align -8"),
        ({"to": "structured", "align": 8192}, "from 1 to 4096"),
        ({"to": "structured", "dense": "x"}, "add --align"),
        ({"to": "dense", "align": 8}, "need --to structured"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, says):
    source = write_checkpoint(tmp_path / "src", pruned(), BASE)
    with pytest.raises(UserError, match=says):
        convert(source, tmp_path / "out", **options)


def test_command_line_reports_the_cost(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "src", pruned(), BASE)
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "structured", "--align", "64"]
    assert run(words) == 0
    assert "note: --align 64 adds" in capsys.readouterr().out
    assert "--align 64" in (tmp_path / "out/README.md").read_text()
    assert run([*words[:2], str(tmp_path / "no"), "--align", "64"]) == 2
    assert "need --to structured" in capsys.readouterr().err
