"""--deterministic: what a GPU needs to give the same bits each time is switched on before it is used, and a run goes
through with it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.ranks.launch import clean_environment
from tests.ranks.run_tasks import losses_of, weights_of

SmallWorld = tuple[Path, Path]
SWITCHES = """
import os, torch
from dialogpt_ds.distributed.world import compute_deterministically
compute_deterministically()
assert not torch.cuda.is_initialized()
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
      torch.backends.cuda.cudnn_sdp_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
      os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


def test_the_switches() -> None:
    for given, workspace in (({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8")):
        done = subprocess.run(
            [sys.executable, "-c", SWITCHES],
            env=os.environ | given,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.split() == ["True", "False", "False", "False", workspace], done.stderr


def test_a_run_computes_the_same_with_it(small_world: SmallWorld, tmp_path: Path) -> None:
    """On a CPU nothing else is computed; what has no deterministic form would end the run."""
    for name, options in (("without", []), ("with", ["--deterministic"])):
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--model", str(small_world[0]),
                   "--train_input_file", str(small_world[1] / "train"), "--eval_input_file",
                   str(small_world[1] / "validation"), "--num_optim_steps", "3", "--fp16", "False", "--output_dir",
                   str(tmp_path / name), *options]  # fmt: skip
        done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
