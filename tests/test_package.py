"""The package as it is installed: a wheel with the commands, every shipped configuration, and the options frozen."""

import dataclasses
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dialogpt_ds.config.arguments import TrainingArguments
from tests.conftest import ROOT

COMMANDS = (
    "dialogpt-dashboard", "dialogpt-doctor", "dialogpt-export", "dialogpt-fetch", "dialogpt-import-pkl",
    "dialogpt-inspect", "dialogpt-plot", "dialogpt-replies", "dialogpt-shards", "dialogpt-train",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dialogpt_ds"}
    assert "dialogpt_ds/py.typed" in names


def test_the_wheels_commands_are_those_of_the_files(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
        timeout=120,
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    assert sorted(path.name for path in (site / "bin").iterdir()) == sorted(COMMANDS)
    for name, file in {"dialogpt-shards": "preprocess/make_shards.py", "dialogpt-train": "launch/train.py"}.items():
        installed = subprocess.run(
            [site / "bin" / name, "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        script = subprocess.run(
            [sys.executable, ROOT / file, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert installed.returncode == script.returncode == 0, installed.stderr + script.stderr
        assert installed.stdout.split("[--config", 1)[1].split() == script.stdout.split("[--config", 1)[1].split()


@pytest.mark.parametrize(
    "file", sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("preprocess/*.py")]), ids=lambda p: p.name
)
def test_commands_only_parse_and_call(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 15


def test_training_options_are_frozen() -> None:
    """Other people's scripts use these names; a change here is a change for them, and belongs into CHANGELOG.md."""
    assert " ".join(field.name for field in dataclasses.fields(TrainingArguments)) == (
        "model_name_or_path init_checkpoint dropout no_token_id attention activation_checkpointing chunked_head "
        "torch_compile train_input_file eval_input_file normalize_data max_seq_length packing loader_workers "
        "on_bad_block cache_dir cache_gb seed train_batch_size valid_batch_size gradient_accumulation_steps "
        "learning_rate lr_schedule warmup_steps warmup_proportion num_optim_steps fp16 loss_scale deterministic "
        "max_skipped_steps deepspeed_config valid_step skip_eval sample_prompts sample_max_new_tokens save_step "
        "save_minutes keep_checkpoints resume continue_from changed_order hang_timeout contact_timeout output_dir "
        "log_dir pbar wandb_project wandb_entity wandb_run_name wandb_tags wandb_group wandb_job_type wandb_artifacts "
        "wandb_mode tensorboard verbose print_config plot_schedule dry_run gpu link expect_world_size local_rank"
    )


def test_shell_scripts_parse() -> None:
    for file in (*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/**/*.sh"), ROOT / ".ci" / "run"):
        assert subprocess.run(["bash", "-n", str(file)], timeout=10).returncode == 0, file
