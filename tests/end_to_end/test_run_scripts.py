"""The scripts that start a whole run: launch/run_SIZE.sh and launch/finetune_12GB.sh."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, write_tsv
from tests.ranks.launch import clean_environment

LAUNCHER = """#!/usr/bin/env bash
# Stands where the deepspeed command would start {gpus} processes: starts one of them, which prints what all would run.
printf '%s\\n' "$@" > "{folder}/words"
printf '%s' "${{PDSH_SSH_ARGS_APPEND:-}}" > "{folder}/ssh"
while [ "$1" != launch/train.py ]; do shift; done
RANK=0 WORLD_SIZE={gpus} LOCAL_RANK=0 exec python "$@" --print_config
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a limit of 512 tokens, enough for a step of the largest global batch."""
    from dialogpt_ds.preprocessing.make import ShardArguments, make_shards

    folder = tmp_path_factory.mktemp("data512")
    source = write_tsv(folder / "all.tsv", 3_000)
    make_shards(
        ShardArguments(
            [str(source)], output=str(folder / "shards"), max_seq_length=512, workers=1, validation_fraction=0.02
        ),
        say=lambda _: None,
    )
    return folder / "shards"


def run_script(
    script: str, data: Path, folder: Path, gpus: int, card_mib: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script on a machine with cards of so many MiB, as nvidia-smi tells of them; 0: without any."""
    launcher = folder / "bin" / "deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER.format(gpus=gpus, folder=folder))
    card = launcher.with_name("nvidia-smi")
    card.write_text(
        f"#!/usr/bin/env bash\nprintf '%s\\n' 81559 {card_mib}\n" if card_mib else "#!/usr/bin/env bash\nexit 9\n"
    )
    for program in (launcher, card):
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = clean_environment() | variables | {"DATA": str(data), "OUTPUT": str(folder / "out")}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=folder,
        check=False,
    )


def what_runs(printed: str) -> tuple[dict[str, object], dict[str, object]]:
    """Return arguments and DeepSpeed configuration as --print_config printed them."""
    arguments, deepspeed = printed.split("# ds_config.json")
    return yaml.safe_load(arguments), json.loads(deepspeed)


def test_a_run_of_the_paper_on_eight_gpus(data: Path, tmp_path: Path) -> None:
    done = run_script("run_117M.sh", data, tmp_path, 8)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text().splitlines()[:2] == ["--num_gpus", "8"]
    arguments, deepspeed = what_runs(done.stdout)
    assert arguments["model_name_or_path"] == "117M"
    assert (arguments["max_seq_length"], arguments["num_optim_steps"], arguments["lr_schedule"]) == (
        512,
        368_000,
        "noam",
    )
    assert (deepspeed["train_batch_size"], deepspeed["gradient_accumulation_steps"]) == (160, 1)
    assert deepspeed["zero_optimization"]["stage"] == 1  # type: ignore[index]


def test_fewer_gpus_take_the_same_global_batch_in_more_pieces(data: Path, tmp_path: Path) -> None:
    done = run_script("run_345M.sh", data, tmp_path, 2, GPUS="2")
    assert done.returncode == 0, done.stderr
    arguments, deepspeed = what_runs(done.stdout)
    assert (arguments["model_name_or_path"], arguments["num_optim_steps"]) == ("345M", 736_000)
    numbers = [
        deepspeed[name]
        for name in ("train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu")
    ]
    assert numbers == [80, 4, 10]


@pytest.mark.parametrize(("card_mib", "accumulation"), [(16_160, 8), (24_564, 4), (40_536, 2), (81_559, 1)])
def test_larger_cards_take_the_same_step_in_fewer_pieces(
    data: Path, tmp_path: Path, card_mib: int, accumulation: int
) -> None:
    done = run_script("run_762M.sh", data, tmp_path, 1, card_mib, GPUS="1")
    assert done.returncode == 0, done.stderr
    _, deepspeed = what_runs(done.stdout)
    assert (deepspeed["train_batch_size"], deepspeed["gradient_accumulation_steps"]) == (40, accumulation)


@pytest.mark.parametrize(("card_mib", "accumulation"), [(12_282, 32), (24_564, 8), (40_536, 4), (81_559, 2)])
def test_fine_tuning_takes_larger_pieces_on_larger_cards(
    data: Path, small_world: tuple[Path, Path], tmp_path: Path, card_mib: int, accumulation: int
) -> None:
    run_script(
        "finetune_12GB.sh", data, tmp_path, 1, card_mib, MODEL=str(small_world[0]), CONFIG="ds_configs/zero1_fp16.json"
    )
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("--gradient_accumulation_steps") + 1] == str(accumulation)


def test_a_host_file_goes_to_the_launcher_and_its_ssh_notices_lost_links(data: Path, tmp_path: Path) -> None:
    done = run_script("run_762M.sh", data, tmp_path, 16, GPUS="16", HOSTS="hosts")
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:2] == ["--hostfile", "hosts"]
    assert words[words.index("--expect_world_size") + 1] == "16"
    arguments, deepspeed = what_runs(done.stdout)
    assert arguments["model_name_or_path"] == "762M"
    numbers = (deepspeed["train_batch_size"], arguments["num_optim_steps"])
    assert numbers == (80, 441_500), "40 and 883,000 on 8 GPUs; twice the GPUs, twice the rows, half the steps"
    assert "-o ServerAliveInterval=15" in (tmp_path / "ssh").read_text()


def test_a_number_of_gpus_that_does_not_divide_is_refused(data: Path, tmp_path: Path) -> None:
    done = run_script("run_117M.sh", data, tmp_path, 3, GPUS="3")
    assert done.returncode == 2
    assert done.stderr == "error: GPUS=3: give 1, 2, 4, 8 or a multiple of 8\n"


def test_fine_tuning_trains_a_folder_for_so_many_epochs(small_world: tuple[Path, Path], tmp_path: Path) -> None:
    """With the real launcher, on the CPU."""
    from dialogpt_ds.shards.reader import ShardDirectory

    totals = ShardDirectory.open(str(small_world[1] / "train"), "--train_input_file").manifest
    steps = max(-(-2 * totals.totals["tokens"] // int(0.99 * totals.max_seq_length * 64)), 1)
    environment = clean_environment() | {
        "MODEL": str(small_world[0]), "DATA": str(small_world[1]), "OUTPUT": str(tmp_path / "out"),
        "CONFIG": "ds_configs/cpu_fp32.json",
    }  # fmt: skip
    command = [
        "bash",
        "launch/finetune_12GB.sh",
        "--train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "1",
        "--num_optim_steps",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"--num_optim_steps {steps} " in done.stderr, "what is given comes after it and holds"
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) >= 2


def test_fine_tuning_on_long_rows_takes_smaller_pieces(
    data: Path, small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run_script(
        "finetune_12GB.sh", data, tmp_path, 1, MODEL=str(small_world[0]), CONFIG="ds_configs/zero1_fp16.json"
    )
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("--gradient_accumulation_steps") + 1] == "32", f"2 rows of 512 at a time\n{done.stderr}"


def test_fine_tuning_without_shards_says_what_is_missing(small_world: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_script("finetune_12GB.sh", tmp_path / "nowhere", tmp_path, 1, MODEL=str(small_world[0]))
    assert done.returncode == 2
    assert "nowhere/train/manifest.json (DATA and EPOCHS)" in done.stderr


def test_fine_tuning_without_a_model_says_how_to_get_one(tmp_path: Path) -> None:
    environment = clean_environment() | {"MODEL": str(tmp_path)}
    command = ["bash", str(ROOT / "launch" / "finetune_12GB.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 2
    assert "launch/fetch_models.py DialoGPT-medium makes it" in done.stderr
