"""`wandb leet`, wandb's own viewer in the terminal, shows an offline run with our step as the axis."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.terminal import Terminal
from tests.ranks.launch import BIN
from tests.servers import wandb_files

SCRIPT = """
import wandb
settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
run = wandb.init(mode="offline", project="chat", name="curves", config={"learning_rate": 0.125}, settings=settings)
run.define_metric("step")
run.define_metric("*", step_metric="step")
for step in range(1, 21):
    run.log({"step": step, "loss": 5 / step, "validation/loss": 6 / step})
run.finish()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which wandb keeps everything below `tmp_path`."""
    folders = {f"WANDB_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "CACHE", "DATA")}
    return os.environ | folders | {"WANDB_DIR": str(tmp_path)}


def test_leet_draws_the_curves_of_an_offline_run(tmp_path: Path, environment: dict[str, str]) -> None:
    # A process of its own: wandb.init would leave a service behind in ours, which every process that we start would
    # use.
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, timeout=60, check=True)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    records = wandb_files.read_records(wandb_files.log_file(folder))
    assert [row["loss"] for row in wandb_files.history(records)] == [5 / step for step in range(1, 21)]

    with Terminal(
        [str(BIN / "wandb"), "leet", "run", str(folder)], rows=50, columns=200, environment=environment
    ) as terminal:
        for text in (
            "State: Finished",
            "Name: curves",
            "learning_rate: 0.125",
            "Metrics [1-3 of 3]",
            "validation/loss",
        ):
            terminal.wait_for(text)
        charts = terminal.wait_for("[x: step]")
        assert re.findall(r"│([^│ ]+) +\[x: step\]", charts) == ["loss", "validation/loss"], "over our own step"
        terminal.send("q")
        assert terminal.wait() == 0
