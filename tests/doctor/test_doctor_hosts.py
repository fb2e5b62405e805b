"""What the doctor makes of hosts that don't answer, differ from each other, or don't reach each other: made-up ones."""

import time
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.doctor import host_facts, hosts, limits, network, software
from dialogpt_ds.doctor.facts import Request
from dialogpt_ds.doctor.meeting import MeetingPlace, Visit
from dialogpt_ds.doctor.report import by_host
from dialogpt_ds.doctor.ssh import SshOutcome, run_for, why_not
from dialogpt_ds.doctor.survey import Answer, Survey
from dialogpt_ds.launching.hostfile import Host
from tests.doctor.made_up import NODE, levels, node, only, pair
from tests.helpers.append_only import append_only


def test_hosts_that_did_not_answer_are_grouped_by_reason() -> None:
    refused = Answer(None, None, "ssh: it wants a password", "ssh-copy-id")
    answers = {f"worker-{n}": refused for n in range(20)} | {
        "slow": Answer(None, None, "no answer within 35 s", "wait", late=True)
    }
    first, second = hosts.ssh_findings(Survey(answers))
    assert (first.level, second.level) == ("problem", "warning")
    assert first.text == "worker-0, worker-1, worker-2, worker-3 and 16 more: ssh: it wants a password"


def test_many_hosts_with_one_trouble_are_one_line_and_one_host_has_its_name_in_the_way_out() -> None:
    refused = {
        name: SshOutcome(255, "", f"root@{name}: Permission denied (publickey).") for name in ("worker-1", "worker-2")
    }
    answers = {name: Answer(None, None, *why_not(name, done, 30.0)) for name, done in refused.items()}
    both = only(hosts.ssh_findings(Survey(answers)))
    assert both.text.startswith(
        "worker-1, worker-2: ssh: it wants a password, or knows no key of this user (root@HOST: Permission denied"
    )
    answers.pop("worker-1")
    one = only(hosts.ssh_findings(Survey(answers)))
    assert "(root@worker-2: Permission denied" in one.text
    assert one.way_out.startswith("ssh-copy-id worker-2 ")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("root@h: Permission denied (publickey,password).", ("it wants a password", "ssh-copy-id HOST")),
        ("Host key verification failed.", ("its host key is not known here", "ssh-keygen -R HOST")),
        ("ssh: Could not resolve hostname h: Name or service not known", ("its name is not known here", "/etc/hosts")),
        ("ssh: connect to host h port 22: Connection refused", ("nothing listens at its ssh port", "--ssh_port")),
        ("ssh: connect to host h port 22: No route to host", ("it can't be reached", "firewall")),
        ("something new", ("ssh failed (something new)", "ssh -v")),
    ],
)
def test_what_ssh_says_is_put_into_words(said: str, words: tuple[str, str]) -> None:
    trouble, way_out = why_not("h", SshOutcome(255, "", said), 30.0)
    assert words[0] in trouble
    assert words[1] in way_out


def test_one_machine_under_two_names_is_a_problem_but_two_containers_are_not() -> None:
    twice = [*pair()[:1], ("localhost", NODE)]
    assert only(hosts.machine_findings(twice)).text == "worker-1 and localhost are one machine (worker-1)"
    assert hosts.machine_findings(pair(boot_id="1")) == []


def test_a_single_host_of_the_hostfile_must_be_the_one_that_starts_it() -> None:
    here = node(hostname="login", boot_id="9")
    finding = only(hosts.launcher_findings([Host("worker-1", 2, 1)], here, pair()[:1]))
    assert finding.level == "problem"
    assert "starts the processes of a single host on the machine that it is started on, which is login" in finding.text
    assert levels(hosts.launcher_findings([Host("worker-1", 2, 1)], NODE, pair()[:1])) == ["ok"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"revision": "1234567890abcdef", "code": "x"}, "git revision 1234567890, here it is abcdef0123"),
        ({"code": "x"}, "other files in dialogpt_ds at the same git revision than here"),
        ({"revision": "", "code": "x"}, "other files in dialogpt_ds (no git checkout there) than here"),
        ({"folder_is_there": False}, "in which the launcher starts the processes"),
    ],
)
def test_other_code_and_a_missing_folder_are_problems(changes: dict[str, Any], words: str) -> None:
    finding = only(software.code_findings(pair(**changes), NODE))
    assert finding.level == "problem"
    assert finding.text.startswith("worker-2: ")
    assert words in finding.text


def test_another_commit_with_the_same_code_is_a_warning_for_the_trainer_takes_it() -> None:
    finding = only(
        [found for found in software.code_findings(pair(revision="1234567890abcdef"), NODE) if found.level != "ok"]
    )
    assert finding.level == "warning"
    assert "git revision 1234567890, here it is abcdef0123, with the same dialogpt_ds" in finding.text


def test_a_run_that_is_started_on_each_host_needs_no_pdsh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    both = [Host("worker-1", 2, 1), Host("worker-2", 2, 2)]
    assert levels(hosts.launcher_findings(both, NODE, pair())) == ["problem"]
    assert levels(hosts.launcher_findings(both, NODE, pair(), no_ssh=True)) == ["ok"]


def test_a_copy_of_the_same_code_without_git_is_as_good() -> None:
    assert levels(software.code_findings(pair(revision=""), NODE)) == ["ok"]


def test_a_broken_pytorch_is_a_problem_and_an_unknown_limit_a_warning() -> None:
    found = software.failure_findings(
        [("", node(failures={"torch_facts": "ImportError: libcudart", "limits": "OSError: x"}))]
    )
    assert levels(found) == ["problem", "warning"]
    assert found[0].text == "PyTorch can't be used: ImportError: libcudart"


def survey(visit: Visit, **place: Any) -> Survey:
    meeting = MeetingPlace(**{"address": "10.0.0.1", "port": 29_500, "token": "/out/.t"} | place)
    first = Answer(NODE, Visit("", "eth0", "10.0.0.1", True))
    return Survey({"worker-1": first, "worker-2": Answer(pair()[1][1], visit)}, meeting)


def test_a_port_that_other_hosts_can_not_reach_is_a_problem_with_a_firewall_in_it() -> None:
    finding = only(network.way_findings(survey(Visit("no answer within 6 s, as where a firewall drops what comes"))))
    assert finding.level == "problem"
    assert finding.text.startswith("worker-2: 10.0.0.1:29500 on worker-1 can't be reached: no answer")
    assert "let the firewalls pass TCP" in finding.way_out


def test_the_way_to_the_first_host_names_the_interfaces_for_nccl() -> None:
    finding = only(network.way_findings(survey(Visit("", "ib0", "10.0.0.2", True))))
    assert finding.level == "ok"
    assert "by worker-1: eth0 (10.0.0.1), worker-2: ib0 (10.0.0.2)" in finding.text
    assert "NCCL_SOCKET_IFNAME=eth0,ib0" in finding.text


def test_a_first_address_that_only_the_first_host_can_use_is_a_problem() -> None:
    finding = only(network.way_findings(survey(Visit(), address="127.0.1.1")))
    assert (finding.level, finding.way_out) == (
        "problem",
        "give the launcher the right one, here too: --master_addr ADDRESS",
    )


def test_a_port_in_use_is_a_problem() -> None:
    assert (
        only(network.port_findings(None, MeetingPlace(port_problem="port 29500 is in use"), 29_500)).level == "problem"
    )
    assert only(network.port_findings(node(port_problem="port 29500 is in use"), None, 29_500)).level == "problem"


def test_an_output_dir_that_is_not_shared_is_a_problem() -> None:
    finding = only(limits.shared_findings(survey(Visit(sees_token=False)), Path("/out")))
    assert (finding.level, finding.text) == ("problem", "worker-2: what worker-1 writes to /out is not seen")
    assert levels(limits.shared_findings(survey(Visit(sees_token=True)), Path("/out"))) == ["ok"]


def test_an_output_dir_without_renames_is_a_problem(tmp_path: Path) -> None:
    with append_only(tmp_path / "out") as output:
        facts = node(**host_facts.output_folder(Request(str(tmp_path), output_dir=str(output))))
        assert levels(findings := limits.output_findings([("", facts)], output, 1, 1, 1)) == ["problem"]
        assert findings[0].text == (
            f"{output} can't be written to as a checkpoint is: its folders can't be renamed (Operation not permitted), "
            f"for --output_dir {output}"
        )
    facts = node(**host_facts.output_folder(Request(str(tmp_path), output_dir=str(tmp_path / "to-be-made"))))
    assert levels(limits.output_findings([("", facts)], tmp_path, 1, 1, 1)) == ["ok"]


def test_lines_that_crash_the_launcher_are_a_problem_where_it_starts_several_hosts(tmp_path: Path) -> None:
    file = tmp_path / ".deepspeed_env"
    file.write_text("# the network\n")
    assert levels(hosts.variables_findings([Host("a", 1, 1)], [file])) == ["warning"]
    assert levels(hosts.variables_findings([Host("a", 1, 1), Host("b", 1, 2)], [file])) == ["problem"]


def test_equal_texts_of_many_hosts_are_one_line() -> None:
    assert by_host([("a", "x"), ("b", "y"), ("c", "x")]) == ["a, c: x", "b: y"]
    assert by_host([("", "x")]) == ["x"]


def test_a_command_that_hangs_is_ended_with_all_that_it_started() -> None:
    started = time.monotonic()
    done = run_for(["sh", "-c", "sleep 60 & sleep 60"], 0.3)
    assert (done.code, done.output) == (None, "")
    assert time.monotonic() - started < 10.0
    assert why_not("h", done, 0.3)[0] == "no answer within 0.3 s"
    assert run_for(["no-such-program"], 1.0).code == 127
