"""Models by name: shapes, dropout, and weights that do not fit."""

import shutil
from pathlib import Path

import pytest
import torch

from dialogpt_ds.errors import UserError
from dialogpt_ds.model.load import build_model, find_model

EOS = 50_256


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        ("117M", 124_439_808, (12, 768, 12)),
        ("345M", 354_823_168, (24, 1024, 16)),
        ("762M", 774_030_080, (36, 1280, 20)),
    ],
)
def test_presets_have_dialogpts_shapes(name: str, parameters: int, shape: tuple[int, int, int]) -> None:
    source = find_model(name, 0.0, EOS, 50_257)
    config = source.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions, config.vocab_size) == (
        *shape,
        1_024,
        50_257,
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(source, None).parameters()) == parameters


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_is_what_was_asked_for_in_loaded_models_too(small_world: tuple[Path, Path], dropout: float) -> None:
    for name, eos, vocabulary in (("tiny", EOS, 50_257), (str(small_world[0]), 256, 257)):
        model = build_model(find_model(name, dropout, eos, vocabulary), None)
        found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert found == {dropout}


def test_loaded_weights_are_those_of_the_folder(small_world: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file

    weights = load_file(small_world[0] / "model.safetensors")
    model = dict(build_model(find_model(str(small_world[0]), 0.0, 256, 257), None).named_parameters())
    assert torch.equal(model["transformer.wte.weight"], weights["transformer.wte.weight"])


def test_init_checkpoint_puts_weights_into_a_preset(small_world: tuple[Path, Path]) -> None:
    source = find_model(str(small_world[0]), 0.0, 256, 257)
    model = build_model(source, str(small_world[0]))
    assert model.config.n_embd == 32
    with pytest.raises(UserError, match=r"the weights in .*small-model' do not fit: .*32 wide.*--model 'tiny' is"):
        build_model(find_model("tiny", 0.0, EOS, 50_257), str(small_world[0]))


def test_missing_tensors_are_named_instead_of_starting_at_random(
    small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_world[0], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["transformer.h.1.attn.c_attn.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors of model .*transformer\.h\.1\.attn\.c_attn\.weight"):
        build_model(find_model(str(tmp_path / "model"), 0.0, 256, 257), None)


def test_a_truncated_weights_file_is_a_mistake_with_its_name(small_world: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(small_world[0], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1_000])
    with pytest.raises(UserError, match=r"the weights in .*model' do not fit"):
        build_model(find_model(str(tmp_path / "model"), 0.0, 256, 257), None)
