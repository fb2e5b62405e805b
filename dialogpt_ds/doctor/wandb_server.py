"""wandb: whether the run would be shown there, and whether its server answers."""

import time
import urllib.error
import urllib.request

from dialogpt_ds.doctor.finding import Finding, ok, warning
from dialogpt_ds.logs.wandb_mode import Mode, choose_mode, server
from dialogpt_ds.redaction import without_secrets

WANDB = "wandb"
WANDB_ANSWER_SECONDS = 5.0


def wandb_findings(asked: Mode) -> list[Finding]:
    """Say where the run's curves would go; nothing of wandb keeps a run from training."""
    mode, why = choose_mode(asked)
    if mode != "online":
        return [ok(WANDB, f"{mode}{f' ({why})' if why else ''}; logs and curves are in output_dir in any case")]
    address = server()
    shown = without_secrets(address)
    started = time.monotonic()
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=WANDB_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it has answered
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        text = f"{shown} gives no answer within {WANDB_ANSWER_SECONDS:.0f} s ({cause}); the run would go on and try again"
        return [warning(WANDB, text, "--wandb_mode offline, and wandb sync afterwards")]
    return [ok(WANDB, f"online, {shown} answers ({time.monotonic() - started:.1f} s)")]
