"""DialoGPT's .pkl files: names, size, damage, and code that is not run."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.commands.import_pkl import main
from dialogpt_ds.errors import UserError
from dialogpt_ds.model.load import build_model, check_init_checkpoint, find_model
from dialogpt_ds.model.pkl import read_pkl

EOS = 50_256


def gpt2(**shape: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**({"n_layer": 2, "n_embd": 64, "n_head": 2} | shape)))


def write_as_dialogpt(model: Any, path: Path, prefix: str = "module.", drop: str = "", zipped: bool = False) -> Path:
    """Write a state dict as DialoGPT's are: fp16, PyTorch's format of 2019, the head under its old name, masks among
    the weights."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("lm_head.weight", "lm_head.decoder.weight")
        state[prefix + (name.removeprefix(drop) if drop else name)] = tensor.half()
    for layer in range(model.config.n_layer):
        mask = torch.tril(torch.ones(1, 1, 8, 8))
        state[f"{prefix}{'transformer.'.removeprefix(drop) if drop else 'transformer.'}h.{layer}.attn.bias"] = (
            mask.half()
        )
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize(
    ("prefix", "drop", "zipped"),
    [("", "", False), ("module.", "", False), ("module.module.", "", True), ("", "transformer.", False)],
)
def test_every_spelling_of_the_names_gives_the_same_model(tmp_path: Path, prefix: str, drop: str, zipped: bool) -> None:
    model = gpt2()
    path = write_as_dialogpt(model, tmp_path / "medium_ft.pkl", prefix, drop, zipped)
    source = find_model(str(path), 0.0, EOS, 50_257)
    loaded = build_model(source, None)
    assert (source.config.n_layer, source.config.n_embd, source.config.n_head) == (2, 64, 2)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight, "tied"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.half().float(), dict(loaded.named_parameters())[name]), name


def test_a_pkl_as_init_checkpoint_of_its_own_preset(tmp_path: Path) -> None:
    path = str(write_as_dialogpt(gpt2(), tmp_path / "x.pkl"))
    source = find_model("tiny", 0.0, EOS, 50_257)
    check_init_checkpoint(path, source)
    assert torch.equal(build_model(source, path).transformer.wpe.weight, gpt2().transformer.wpe.weight.half().float())


def test_a_wrong_preset_is_named_with_the_right_one(tmp_path: Path) -> None:
    path = str(write_as_dialogpt(gpt2(), tmp_path / "x.pkl"))
    with pytest.raises(
        UserError, match=r"a GPT-2 \(tiny, 2 layers.*--model '117M' is a GPT-2 \(117M, 12 layers.*give --model tiny"
    ):
        check_init_checkpoint(path, find_model("117M", 0.0, EOS, 50_257))


def test_a_folder_of_another_size_is_named_with_the_right_preset(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="give --model tiny"):
        build_model(find_model("small", 0.0, EOS, 50_257), str(tmp_path / "hf"))


def test_a_folder_whose_config_is_of_another_size_is_one_sentence(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "hf")
    gpt2(n_layer=3, n_embd=128).config.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"the config\.json beside them says a GPT-2 \(3 layers, 128 wide") as caught:
        build_model(find_model(str(tmp_path / "hf"), 0.0, EOS, 50_257), None)
    assert len(str(caught.value)) < 500


class _Code:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path, by: str) -> None:
    path, proof = tmp_path / "evil.pkl", tmp_path / "proof"
    content = {"transformer.wte.weight": torch.zeros(4, 4), "x": _Code(proof)}
    if by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    # torch knows a plain pickle by its protocol, which is none of its own, and does not get as far as the code.
    words = (
        "would run code that came with the file"
        if by == "torch"
        else "can't be read as a .pkl of PyTorch with tensors alone"
    )
    with pytest.raises(UserError, match=words):
        find_model(str(path), 0.0, EOS, 50_257)
    assert not proof.exists()


def test_an_unequal_head_is_kept(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    path = str(write_as_dialogpt(model, tmp_path / "x.pkl"))
    loaded = build_model(find_model(path, 0.0, EOS, 50_257), None)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half().float())
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    with pytest.raises(UserError, match="does not exist"):
        read_pkl(str(path), "--model")
    state = torch.load(write_as_dialogpt(gpt2(), path), weights_only=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"is it whole\?"):
        read_pkl(str(path), "--model")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"is it whole\?"):
        read_pkl(str(path), "--model")
    del state["module.transformer.h.1.mlp.c_fc.weight"]
    state["module.transformer.h.0.ln_1.bias"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(
        UserError,
        match=r"2 of the tensors .* wrong: transformer\.h\.1\.mlp\.c_fc\.weight is missing; .*ln_1\.bias is \(3,\)",
    ):
        read_pkl(str(path), "--model")
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not those of a GPT-2"):
        read_pkl(str(path), "--model")
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="no state dict"):
        read_pkl(str(path), "--model")


def test_the_import_command_writes_a_folder_that_transformers_loads(
    small_world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(small_world[0])
    path = write_as_dialogpt(model, tmp_path / "small_ft.pkl")
    argv = [str(path), str(tmp_path / "imported"), "--tokenizer", str(small_world[0])]
    code = main(argv)
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "in float16" in output.out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "imported", dtype="auto")
    assert loaded.dtype == torch.float16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.half(), dict(loaded.named_parameters())[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert tokenizer.decode(tokenizer("hello there").input_ids) == "hello there"
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main([str(path), str(tmp_path / "mine"), "--tokenizer", str(small_world[0]), "--overwrite"]) == 2
    assert "is no earlier export" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert main(argv) == 2
    assert "exists; name another folder, or give --overwrite" in capsys.readouterr().err
