"""Every mistake ends before training, with exit code 2 and one message that says what to do."""

import json
import shutil
from pathlib import Path

import pytest

from dialogpt_ds.commands.train import main
from tests.ranks.rank_tasks import write_deepspeed

SmallWorld = tuple[Path, Path]


def arguments(small_world: SmallWorld, folder: Path, **changes: str | None) -> list[str]:
    model, shards = small_world
    given: dict[str, str | None] = {
        "model": str(model), "train_input_file": str(shards / "train"), "eval_input_file": str(shards / "validation"),
        "deepspeed_config": write_deepspeed(folder, 1, "bf16"), "output_dir": str(folder / "out"),
        "num_optim_steps": "2",
    }  # fmt: skip
    return [word for name, value in (given | changes).items() if value is not None for word in (f"--{name}", value)]


def check_fails(capsys: pytest.CaptureFixture[str], argv: list[str], *fragments: str) -> None:
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message, message


def test_a_missing_shard_directory(small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_fails(
        capsys,
        arguments(small_world, tmp_path, train_input_file="/no/where"),
        "--train_input_file '/no/where' does not exist",
    )
    assert not (tmp_path / "out").exists(), "nothing was started"


def test_no_shard_directory_at_all(small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(small_world, tmp_path, train_input_file=None, eval_input_file=None)
    check_fails(
        capsys,
        argv,
        "--train_input_file is missing",
        "--eval_input_file is missing: name a shard directory, or give --skip_eval",
    )


def test_a_directory_without_a_manifest(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_fails(
        capsys,
        arguments(small_world, tmp_path, train_input_file=str(tmp_path)),
        "has no manifest.json",
        "make one with preprocess/make_shards.py",
    )
    (tmp_path / "shard-000000.tar").touch()
    check_fails(
        capsys, arguments(small_world, tmp_path, train_input_file=str(tmp_path)), "an unfinished run of make_shards.py"
    )
    check_fails(
        capsys,
        arguments(small_world, tmp_path, train_input_file=str(small_world[1])),
        "its parts have",
        "name one of them",
    )


def test_a_manifest_changed_by_hand_or_of_another_version(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_world[1] / "train", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"max_seq_length": 32}))
    check_fails(
        capsys, arguments(small_world, tmp_path, train_input_file=str(copy)), "was changed after it was written"
    )
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    check_fails(capsys, arguments(small_world, tmp_path, train_input_file=str(copy)), "version 99, this program reads")
    (copy / "manifest.json").write_text("{")
    check_fails(
        capsys, arguments(small_world, tmp_path, train_input_file=str(copy)), "is not a manifest of this program"
    )


def test_a_missing_or_shortened_shard(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_world[1] / "train", copy)
    shard = copy / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    check_fails(
        capsys,
        arguments(small_world, tmp_path, train_input_file=str(copy)),
        "shard-000000.tar has",
        "the manifest says",
    )
    shard.unlink()
    check_fails(capsys, arguments(small_world, tmp_path, train_input_file=str(copy)), "shard-000000.tar is missing")


def test_a_tokenizer_that_is_not_the_shards(
    small_world: SmallWorld, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_fails(
        capsys,
        arguments(small_world, tmp_path, eval_input_file=str(shards)),
        "was made with tokenizer 'gpt2'",
        "make both with one tokenizer",
    )
    check_fails(
        capsys, arguments(small_world, tmp_path, train_input_file=str(shards), eval_input_file=str(shards)),
        "has 257 token ids, the shards were made with 50,257",
    )  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(small_world[1] / "train", copy)
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(shards / "tokenizer", copy / "tokenizer")
    check_fails(
        capsys, arguments(small_world, tmp_path, train_input_file=str(copy)), "is not the one that", "was made with"
    )


def test_a_model_with_another_tokenizer(
    small_world: SmallWorld, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_world[0], model)
    for file in (shards / "tokenizer").iterdir():
        shutil.copy(file, model)
    check_fails(
        capsys,
        arguments(small_world, tmp_path, model=str(model)),
        "has a tokenizer with sha256",
        "make the shards again with --tokenizer",
    )


@pytest.mark.parametrize(
    ("length", "fragment"),
    [
        ("129", "--max_seq_length 129 is more than the 128 positions"),
        ("63", "--max_seq_length 63 is below the limit of 64 tokens"),
    ],
)
def test_a_row_length_the_model_or_the_shards_do_not_allow(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: str, fragment: str
) -> None:
    check_fails(capsys, arguments(small_world, tmp_path, max_seq_length=length), fragment)


def test_an_unknown_key_in_the_json_or_on_the_command_line(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "typo.json"
    config.write_text('{"zero_optimisation": {"stage": 2}}')
    check_fails(
        capsys, arguments(small_world, tmp_path, deepspeed_config=str(config)), "zero_optimisation", "zero_optimization"
    )
    check_fails(capsys, [*arguments(small_world, tmp_path), "--learning_rat", "1"], "--learning_rat")
    yaml = tmp_path / "run.yaml"
    yaml.write_text("learning_rat: 1\n")
    check_fails(capsys, [*arguments(small_world, tmp_path), "--config", str(yaml)], "learning_rat")


def test_an_impossible_batch(small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_fails(
        capsys, arguments(small_world, tmp_path, train_batch_size="3", gradient_accumulation_steps="2"),
        "3 rows per optimizer step can't be divided over 1 GPUs", "A solution: 4 rows in all",
    )  # fmt: skip


def test_fewer_rows_than_one_global_batch(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_fails(
        capsys, arguments(small_world, tmp_path, train_batch_size="100000"),
        "rows of 64 tokens, fewer than the 100,000 rows that one optimizer step over all ranks takes", "Lower "
                                                                                                       "train_batch_size",
    )  # fmt: skip


def test_a_world_of_another_size_than_expected(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_fails(
        capsys,
        arguments(small_world, tmp_path, expect_world_size="16"),
        "--expect_world_size 16, but 1 processes were started",
    )


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"num_optim_steps": "0"}, "--num_optim_steps 0 must be 1 or more"),
        ({"learning_rate": "-1"}, "--learning_rate -1.0 must be above 0"),
        ({"dropout": "1.5"}, "--dropout 1.5 is no probability"),
        ({"model": "1.5B"}, "--model '1.5B' is no preset (117M, 345M, 762M, small, tiny)"),
        ({"model": "/tmp"}, "is a folder without a model's config.json"),
        ({"model": "medium_ft.pkl"}, "--model 'medium_ft.pkl' does not exist, or is no file"),
        ({"init_checkpoint": "/no/where"}, "--init_checkpoint '/no/where' is no folder with a Hugging Face model"),
        ({"resume": "must"}, "has no complete checkpoint"),
        ({"continue_from": "7"}, "has no checkpoint of that step; it has: none"),
        ({"deepspeed_config": "/no/where.json"}, "/no/where.json"),
        ({"lr_schedule": "nom"}, "lr_schedule"),
        (
            {"train_input_file": "http://127.0.0.1:9/shards"},
            "manifest.json can't be fetched: curl can't connect (exit code 7). Is it",
        ),
    ],
)
def test_other_mistakes(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], fragment: str
) -> None:
    check_fails(capsys, arguments(small_world, tmp_path, **changes), fragment)


def test_print_config_shows_what_would_run_and_stops(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(small_world, tmp_path), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "max_seq_length: 64" in printed
    assert '"train_micro_batch_size_per_gpu": 2' in printed
    assert not (tmp_path / "out").exists()


def test_an_evaluation_tsv_is_read_like_shards_of_it(small_world: SmallWorld, tmp_path: Path) -> None:
    from dialogpt_ds.commandline import parse
    from dialogpt_ds.config.arguments import TrainingArguments
    from dialogpt_ds.distributed.world import World
    from dialogpt_ds.training.settings import prepare

    file = tmp_path / "dev.tsv"
    file.write_text("1.0 hello EOS 0.0 there\t1.0 you\nhi\tone\n")
    argv = arguments(small_world, tmp_path, eval_input_file=str(file))
    assert main(argv) == 2, "half of the turns have weights, so nobody can tell"
    file.write_text("hi there\tone\tthree\n")
    evaluation = prepare(parse(TrainingArguments, "test", argv), World(0, 1, 0)).evaluation
    assert evaluation is not None
    # Two references, each a target with its EOS: 3 + 1 and 5 + 1 bytes.
    assert evaluation.manifest.totals["target_tokens"] == 10
    assert evaluation.manifest.totals["examples"] == 2


def test_an_output_folder_that_cannot_be_made(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    check_fails(
        capsys,
        arguments(small_world, tmp_path, output_dir=str(tmp_path / "file" / "out")),
        "--output_dir",
        "can't be made",
    )


def test_tasks_of_mpirun_that_do_not_know_where_to_meet(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_fails(
        capsys, arguments(small_world, tmp_path), "mpirun started 4 tasks, but nothing tells them where to meet"
    )


def test_the_old_name_of_bf16_is_bf16(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "old.json"
    config.write_text('{"bfloat16": {"enabled": true}}')
    assert main([*arguments(small_world, tmp_path, deepspeed_config=str(config)), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert '"bf16": {' in printed
    assert "continue_from" not in printed, "run_config.yaml repeats the run, not this start of it"


@pytest.mark.parametrize(("option", "value"), [("torch_compile", "True"), ("attention", "flash_attention_2")])
def test_what_may_add_in_another_order_each_time_excludes_determinism(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    argv = arguments(small_world, tmp_path, deterministic="True", **{option: value})
    check_fails(capsys, argv, f"--deterministic excludes --{option}", "leave one out")


def test_varlen_attention_without_a_gpu(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(small_world, tmp_path, attention="varlen")
    check_fails(capsys, argv, "--attention varlen: this run is not on an NVIDIA GPU", "leave --attention out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"gpu": "B200", "dry_run": "True"},
            "--gpu 'B200' is none of those whose figures are known here: H100, H200, A100-40",
        ),
        (
            {"gpu": "H100"},
            "--gpu and --link are for a dry run on GPUs that need not be here: give --dry_run --gpu NAME",
        ),
        ({"link": "pcie", "dry_run": "True"}, "--gpu and --link are for a dry run"),
        (
            {"gpu": "v100", "dry_run": "True"},
            "bf16 needs compute capability 8.0, and --gpu V100 has 7.0: take a fp16 configuration",
        ),
        (
            {"gpu": "t4", "link": "nvlink", "dry_run": "True", "deepspeed_config": None},
            "--link nvlink: T4 has none; give pcie",
        ),
    ],
)
def test_a_gpu_that_is_not_known_or_can_not_do_it(
    small_world: SmallWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, str | None],
    says: str,
) -> None:
    check_fails(capsys, arguments(small_world, tmp_path, **options), says)
