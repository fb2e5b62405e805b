"""wandb on rank 0: online with a key, offline without, and never in the way of training."""

import netrc
import os
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

Mode = Literal["auto", "online", "offline", "disabled"]


def choose_mode(asked: Mode) -> str:
    """Return the mode that holds: the flag over WANDB_MODE; without both, online where there is a key, else offline."""
    if asked != "auto":
        return asked
    stated = os.environ.get("WANDB_MODE", "")
    if stated:
        return stated
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Look for a key where wandb looks: the environment, then the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """A run that takes metrics until wandb fails, which is said once."""

    def __init__(
        self,
        *,
        mode: Mode,
        project: str,
        name: str,
        tags: list[str],
        folder: Path,
        config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        self.run: Any = None
        self.mode = choose_mode(mode)
        if self.mode == "disabled":
            return
        try:
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(
                project=project, name=name, tags=tags or None, dir=str(folder), config=config, mode=self.mode,  # type: ignore[arg-type]
                id=run_id, resume="allow" if run_id else None, settings=wandb.Settings(silent=True, init_timeout=60),
            )  # fmt: skip
            # Our own step is the axis, so that wandb's never refuses a point after a resume.
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever wandb raises, the run goes on without it
            self._give_up(error)

    @property
    def run_id(self) -> str | None:
        """Id to resume the same wandb run with."""
        return self.run.id if self.run is not None else None

    def log(self, values: dict[str, Any]) -> None:
        """Send one step's metrics."""
        if self.run is None:
            return
        try:
            self.run.log(values)
        except Exception as error:  # see above
            self._give_up(error)

    def finish(self) -> str | None:
        """End the run; returns the command that uploads an offline run."""
        if self.run is None:
            return None
        folder = Path(self.run.dir).parent
        try:
            self.run.finish()
        except Exception as error:  # see above
            self._give_up(error)
            return None
        return f"wandb sync {folder}" if self.mode == "offline" else None

    def _give_up(self, error: Exception) -> None:
        # A launcher that ends a run ends wandb's process with it; wandb would say so once more, with a traceback, when Python ends.
        usual = sys.unraisablehook
        sys.unraisablehook = lambda about: None if "teardown_atexit" in repr(about.object) else usual(about)
        print(f"warning: wandb failed and is left out from here on: {error!r}", file=sys.stderr, flush=True)
        self.run = None
