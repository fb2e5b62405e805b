"""Every line of a hostfile that the launcher would refuse or misread is named, all of them at once."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import _parse_hostfile

from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.hostfile import Host, read_hostfile
from tests.conftest import ROOT

WRONG = {
    "worker-0 slots = 8": "has spaces beside the =, which the launcher refuses: write worker-0 slots=8",
    "worker-0": "has no slots=N, the number of processes there, one for each GPU: write worker-0 slots=8",
    "worker-0 # slots later": "has no slots=N",
    "worker-0 SLOTS=4": "must have slots=N, in small letters, right after the name: write worker-0 slots=4",
    "worker-0 gpu=a100 slots=4": "must have slots=N, in small letters, right after the name: write worker-0 slots=4",
    "slots=4": "has no host name in front of the slots: write one host a line, as in: worker-0 slots=8",
    "worker-0 slots=0": "has 0 slots, so no process would run there",
    "worker-0 slots=8,4": "has ',4' after slots=8, which the launcher ignores in silence",
    "worker-0 slots=8 worker-1 slots=8": "has 'worker-1 slots=8' after slots=8, which the launcher ignores in silence",
    "worker-0:2222 slots=8": "has a : in the name, and neither ssh nor pdsh takes a port",
    "worker-[0-3] slots=8": "names several hosts in a way that only pdsh knows",
    "wörker slots=8": "has a name with characters that no host name has",
}
REFUSED_BY_THE_LAUNCHER = [line for line, words in WRONG.items() if "write" in words or "no slots" in words]


def read(folder: Path, text: str) -> list[Host]:
    file = folder / "hosts"
    file.write_bytes(text.encode())
    return read_hostfile(file)


def refusal(folder: Path, text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(folder, text)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "text",
    [
        "worker-1 slots=8\nworker-2 slots=4\n",
        "worker-1 slots=8\r\nworker-2 slots=4\r\n",
        "# all of them\n\n   worker-1\t slots=8\n  # the second\nworker-2 slots=4 # four of its eight\n",
        "worker-1 slots=8 max_slots=8\nworker-2 slots=4",
        "worker-1 slots=08\nworker-2 slots=4\n",
    ],
)
def test_what_the_launcher_reads_as_it_is_meant_is_read_the_same_way(tmp_path: Path, text: str) -> None:
    hosts = read(tmp_path, text)
    assert {host.name: host.slots for host in hosts} == {"worker-1": 8, "worker-2": 4}
    with open(tmp_path / "hosts", encoding="utf-8") as file:
        assert _parse_hostfile(file.readlines()) == {host.name: host.slots for host in hosts}


def test_a_user_in_front_of_a_name_is_kept_for_ssh(tmp_path: Path) -> None:
    assert read(tmp_path, "# nodes\ntrain@10.0.0.7 slots=2\n") == [Host("train@10.0.0.7", 2, 2)]


@pytest.mark.parametrize("line", WRONG)
def test_a_line_that_would_be_misread_is_named_with_the_way_out(tmp_path: Path, line: str) -> None:
    (message,) = refusal(tmp_path, f"# hosts\n{line}\n")
    assert message.startswith(f"{tmp_path / 'hosts'}:2: {line!r} ")
    assert WRONG[line] in message


@pytest.mark.parametrize("line", REFUSED_BY_THE_LAUNCHER)
def test_what_is_said_to_be_refused_is_refused_by_the_launcher(line: str) -> None:
    with pytest.raises(ValueError, match="bad entry"):
        _parse_hostfile([line])


def test_all_problems_come_at_once_and_a_host_named_twice_is_one(tmp_path: Path) -> None:
    messages = refusal(tmp_path, "a slots=8\nb slots = 8\na slots=4\na slots=8\nc\n")
    assert [message.split(": ")[0].rpartition(":")[2] for message in messages] == ["2", "3", "4", "5"]
    assert "names a host that line 1 has already with slots=8, and the launcher refuses that" in messages[1]
    assert "names a host that line 1 has already, and the launcher refuses that: remove one of the two" in messages[2]


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    (message,) = refusal(tmp_path, "\ufeffworker-0 slots=8\n")
    assert ":1: begins with a byte order mark" in message


@pytest.mark.parametrize("text", ["", "\n \n", "# worker-0 slots=8\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    assert "names no host: write one host a line" in refusal(tmp_path, text)[0]


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist .* would only warn and start the run on this machine alone"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(UserError, match="is a folder"):
        read_hostfile(tmp_path)
    (tmp_path / "hosts").write_bytes(b"w\xf6rker slots=8\n")
    with pytest.raises(UserError, match="is no text file in UTF-8"):
        read_hostfile(tmp_path / "hosts")


def test_the_shipped_example_is_right() -> None:
    assert all(host.slots == 8 for host in read_hostfile(ROOT / "launch" / "hostfile.example"))
