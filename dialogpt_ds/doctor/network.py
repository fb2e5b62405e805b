"""The network: the port where the ranks meet, the way to it, the interface, wandb's server."""

import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.meeting import MeetingPlace
from dialogpt_ds.doctor.report import Finding, by_host, ok, problem, warning
from dialogpt_ds.doctor.survey import Survey
from dialogpt_ds.logs.wandb_mode import Mode, choose_mode, server
from dialogpt_ds.redaction import without_secrets

PORT, NETWORK, NAME, WANDB = "port", "network", "host name", "wandb"
WANDB_ANSWER_SECONDS = 5.0


def port_findings(facts: HostFacts | None, meeting: MeetingPlace | None, port: int) -> list[Finding]:
    """Return whether the master port is free on the first host: as a place to meet, else as this machine says."""
    said = meeting.port_problem if meeting else facts.port_problem if facts else None
    if said is None:
        return [warning(PORT, f"whether port {port} is free could not be asked on the first host")]
    if said:
        return [
            problem(
                PORT, f"{said}, and the ranks meet there", "another one for the launcher, here too: --master_port 29501"
            )
        ]
    return [ok(PORT, f"{port} is free{' on the first host' if meeting else ''}")]


def way_findings(survey: Survey) -> list[Finding]:
    """Return which hosts can't open a connection to the place where the ranks meet, and the interfaces that lead
    there."""
    meeting = survey.meeting
    if meeting is None or len(survey.answers) < 2:
        return []
    first, *others = survey.answers
    visits = [(name, answer.visit) for name, answer in survey.answers.items() if answer.visit]
    place = f"{meeting.address}:{meeting.port} on {first}"
    if not meeting.address or is_loopback(meeting.address):
        return [
            problem(
                NETWORK,
                f"{first} has {meeting.address or 'no address'} as its first address, and the other hosts would look "
                "for rank 0 there",
                "give the launcher the right one, here too: --master_addr ADDRESS",
            )
        ]
    blocked = [(name, f"{place} can't be reached: {visit.connect_problem}") for name, visit in visits
               if visit.connect_problem and name in others]  # fmt: skip
    way_out = (
        "let the firewalls pass TCP between the hosts, all ports of it (NCCL and gloo take more than this one); where "
        "the address is that of the wrong network: --master_addr ADDRESS"
    )
    if blocked:
        return [problem(NETWORK, text, way_out) for text in by_host(blocked)]
    interfaces = {visit.interface for name, visit in visits if visit.interface}
    ways = by_host((name, f"{visit.interface} ({visit.own_address})") for name, visit in visits if visit.interface)
    reached = (
        f"{place} can be reached"
        if not meeting.port_problem
        else f"the way to {place} was not tried, its port being in use"
    )
    setting = (
        f"NCCL_SOCKET_IFNAME={','.join(sorted(interfaces))} in .deepspeed_env says so where NCCL takes another"
        if interfaces
        else ""
    )
    return [
        ok(NETWORK, "; ".join(part for part in (reached, "by " + ", ".join(ways[:4]) if ways else "", setting) if part))
    ]


def name_findings(seen: Sequence[tuple[str, HostFacts]]) -> list[Finding]:
    """Return which hosts call themselves by a loopback address; only of interest where there are several."""
    if len(seen) < 2:
        return []
    loopback = [
        (name, f"its own name is {', '.join(facts.name_addresses)} there")
        for name, facts in seen
        if facts.name_addresses and all(is_loopback(address) for address in facts.name_addresses)
    ]
    if not loopback:
        return [ok(NAME, "every host knows itself by an address that others can reach")]
    note = "gloo would wait there for the others; launch/train.py names the right interface to it (GLOO_SOCKET_IFNAME)"
    return [ok(NAME, f"{text}: {note}") for text in by_host(loopback)]


def is_loopback(address: str) -> bool:
    """Return whether only the host itself can use an address."""
    return address.startswith("127.") or address == "::1"


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
        text = (
            f"{shown} gives no answer within {WANDB_ANSWER_SECONDS:.0f} s ({cause}); the run would go on and try again"
        )
        return [warning(WANDB, text, "--wandb_mode offline, and wandb sync afterwards")]
    return [ok(WANDB, f"online, {shown} answers ({time.monotonic() - started:.1f} s)")]
