"""Who a process is, as srun and MPI tell it."""

import pytest

from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.processes import adopt_scheduler, first_host, only_gpu, slurm_tasks_here

SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "node[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
}


def test_a_task_of_srun_knows_its_rank_and_where_to_meet() -> None:
    environment = dict(SRUN)
    adopt_scheduler(environment)
    set_now = {name: value for name, value in environment.items() if name not in SRUN}
    assert set_now == {
        "RANK": "9",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "LOCAL_SIZE": "3",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(15_000 + 7 * 4242 % 17_000),
    }


def test_all_tasks_of_a_step_meet_at_one_port_and_another_step_at_another() -> None:
    ports = []
    for changes in ({}, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "4243"}):
        environment = SRUN | changes
        adopt_scheduler(environment)
        ports.append(int(environment["MASTER_PORT"]))
    assert ports[0] == ports[1]
    assert len(set(ports[1:])) == 3
    assert all(15_000 <= port < 32_000 for port in ports)


def test_what_a_person_set_holds() -> None:
    environment = SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29501"}
    adopt_scheduler(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.9", "29501")


def test_a_launcher_below_srun_goes_before_it() -> None:
    environment = SRUN | {"RANK": "3", "WORLD_SIZE": "4"}
    adopt_scheduler(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("3", "4")


@pytest.mark.parametrize(
    "changes", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "16"}]
)
def test_a_single_task_and_the_batch_script_itself_are_one_process(changes: dict[str, str | None]) -> None:
    environment = {name: value for name, value in (SRUN | changes).items() if value is not None}
    adopt_scheduler(environment)
    assert "RANK" not in environment


def test_ranks_of_mpirun_in_a_job_of_slurm_are_not_taken_for_the_daemons_that_srun_started() -> None:
    environment = SRUN | {
        "OMPI_COMM_WORLD_RANK": "19",
        "OMPI_COMM_WORLD_SIZE": "24",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "29500",
    }
    adopt_scheduler(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")] == ["19", "24", "3", "8"]


def test_a_persons_shell_in_a_step_of_many_tasks_is_one_process() -> None:
    environment = SRUN | {"SLURM_PTY_PORT": "41234"}
    adopt_scheduler(environment)
    assert "RANK" not in environment


def test_tasks_of_mpirun_need_a_place_to_meet() -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    with pytest.raises(
        UserError, match=r"mpirun started 4 tasks, but nothing tells them where to meet: set MASTER_ADDR"
    ):
        adopt_scheduler(dict(environment))
    environment |= {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    adopt_scheduler(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")] == ["2", "4", "0", "2"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node07", "node07"),
        ("n1,n2", "n1"),
        ("node[07-12,15],gpu3", "node07"),
        ("node[3,5-6]-ib,x", "node3-ib"),
        ("rack[1-2]slot[03-04]", "rack1slot03"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_on_each_host() -> None:
    counts = [
        slurm_tasks_here({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(host)}) for host in range(3)
    ]
    assert counts == [4, 4, 3]
    assert slurm_tasks_here({}) is None


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    def local_rank(visible: int, **environment: str) -> str:
        environment |= {"LOCAL_RANK": "3"}
        only_gpu(visible, environment)
        return environment["LOCAL_RANK"]

    assert local_rank(1, SLURM_PROCID="11", RANK="11") == "0"
    assert local_rank(4, SLURM_PROCID="11", RANK="11") == "3"
    assert local_rank(1, SLURM_PROCID="0", RANK="3") == "3", "a launcher in a batch script, whose ranks are its own"
    assert local_rank(1) == "3", "the launcher shows all GPUs to each of its processes; one is missing then"
