"""All of the doctor's checks, in the order of the report, and what each needs of the others."""

import os
from pathlib import Path

from dialogpt_ds.commandline import Parsed, quiet_libraries
from dialogpt_ds.config.configuration import Configuration
from dialogpt_ds.doctor import configuration, gpus, hosts, limits, network, run_inputs, software
from dialogpt_ds.doctor.configuration import DoctorArguments
from dialogpt_ds.doctor.facts import HostFacts, Request
from dialogpt_ds.doctor.report import Finding, Report, problem, warning
from dialogpt_ds.doctor.run_inputs import ModelSize
from dialogpt_ds.doctor.ssh import HOST, Ssh
from dialogpt_ds.doctor.survey import SURVEY_SECONDS, Answer, Survey, ask_here, ask_hosts
from dialogpt_ds.doctor.tasks import Task
from dialogpt_ds.launching.environment_file import launcher_exports
from dialogpt_ds.launching.hostfile import Host

IMPORT_SECONDS = 20.0
ANSWER_SECONDS = SURVEY_SECONDS + 8.0
"""With the end of the meeting, and of hosts that were still waiting for their turn."""
MACHINE = "machine"


class Examination:
    """One look at everything that a run needs."""

    def __init__(self, parsed: Parsed[DoctorArguments], report: Report) -> None:
        self.parsed, self.arguments, self.report = parsed, parsed.arguments, report
        self.environment = dict(os.environ)
        """As it was before this process sets anything for its own imports."""
        self.ssh = Ssh(parsed.arguments.ssh_port, launcher_exports())
        self.output_dir = Path(parsed.arguments.output_dir).expanduser().absolute()
        self.hosts: list[Host] = []
        self.configuration: Configuration | None = None
        self.here: HostFacts | None = None
        """What this machine says of itself."""
        self.survey = Survey()
        self.size: ModelSize | None = None
        self.ranks: dict[str, int] = {}

    def run(self) -> None:
        """Look, and print each line as soon as it is known."""
        report = self.report
        found, self.hosts = hosts.hostfile_findings(self.arguments.hostfile, self.arguments.num_gpus)
        report.add(found)
        report.check(hosts.VARIABLES, lambda: hosts.variables_findings(self.hosts))
        self._read_configuration()
        self._ask()
        if self.hosts:
            self._look_at_hosts()
        if self.survey.seen:
            self._look_at_machines()
        self._look_at_inputs()
        report.check(network.WANDB, lambda: network.wandb_findings(self.arguments.wandb_mode), seconds=12.0)

    def _read_configuration(self) -> None:
        def read() -> tuple[list[Finding], Configuration | None]:
            quiet_libraries()
            return configuration.config_findings(self.parsed)

        found = self.report.result(configuration.CONFIG, Task(read), IMPORT_SECONDS)
        if found is not None:
            self.report.add(found[0])
            self.configuration = found[1]

    def _ask(self) -> None:
        """Ask this machine and all others at the same time, and find the model meanwhile."""
        what = f"{len(self.hosts):,} host{'s' * (len(self.hosts) != 1)}" if self.hosts else "this machine"
        self.report.say(f"... asking {what}, where PyTorch and DeepSpeed have to be imported: some seconds")
        request = self._request()
        here: Task[Answer] = Task(lambda: ask_here(request, self.environment))
        arguments = self.arguments
        others: Task[Survey] | None = None
        if self.hosts:
            others = Task(
                lambda: ask_hosts(self.hosts, self.ssh, request, arguments.master_port, arguments.master_addr)
            )
        model = Task(lambda: run_inputs.model_findings(arguments))
        answer = self.report.result(MACHINE, here, ANSWER_SECONDS)
        self.here = answer.facts if answer is not None else None
        if others is not None:
            self.survey = self.report.result(hosts.SSH, others, ANSWER_SECONDS) or Survey()
        elif answer is not None:
            say = warning if answer.late else problem
            self.report.add(
                [say(MACHINE, answer.trouble, answer.way_out.replace(HOST, "localhost"))]
                if answer.facts is None
                else []
            )
            self.survey = Survey({"": answer})
        self.ranks = configuration.ranks_of(arguments, self.hosts, self.survey.seen)
        found = self.report.result(run_inputs.MODEL, model, IMPORT_SECONDS)
        self._model_found, self.size = found or ([], None)

    def _request(self) -> Request:
        known = self.configuration
        return Request(
            folder=os.getcwd(),
            output_dir=str(self.output_dir),
            folders=run_inputs.local_folders(self.arguments),
            precision=known.precision if known else "",
            deepspeed=known.deepspeed if known else {},
            port=0 if self.hosts else self.arguments.master_port,
        )

    def _look_at_hosts(self) -> None:
        report, survey = self.report, self.survey
        report.check(
            hosts.LAUNCHER, lambda: hosts.launcher_findings(self.hosts, self.here, survey.seen, self.arguments.no_ssh)
        )
        report.check(hosts.SSH, lambda: [*hosts.ssh_findings(survey), *hosts.machine_findings(survey.seen)])
        if len(self.hosts) > 1:
            report.check(hosts.KEEP_ALIVE, lambda: hosts.keep_alive_findings(self.hosts, self.ssh))
        report.check(network.NETWORK, lambda: network.way_findings(survey))
        report.check(network.NAME, lambda: network.name_findings(survey.seen))

    def _look_at_machines(self) -> None:
        report, seen, ranks, known = self.report, self.survey.seen, self.ranks, self.configuration
        report.check(software.SOFTWARE, lambda: software.failure_findings(seen))
        report.check(software.CODE, lambda: software.code_findings(seen, self.here))
        report.check(software.VERSIONS, lambda: software.version_findings(seen))
        num_given = bool(self.hosts) or self.arguments.num_gpus is not None
        report.check(gpus.GPUS, lambda: gpus.gpu_findings(seen, ranks, num_given))
        report.check(gpus.CUDA, lambda: gpus.cuda_findings(seen))
        if known is not None:
            report.check(gpus.PRECISION, lambda: gpus.precision_findings(seen, known.precision, known.deepspeed))
            report.check(software.OPS, lambda: software.op_findings(seen, known.deepspeed))
        first = seen[0][1]
        report.check(
            network.PORT, lambda: network.port_findings(first, self.survey.meeting, self.arguments.master_port)
        )
        report.check(limits.SHM, lambda: limits.shm_findings(seen, ranks))
        report.check(limits.FILES, lambda: limits.file_findings(seen, sum(ranks.values())))
        report.check(limits.MEMORY, lambda: limits.memory_findings(seen, ranks))
        report.check(limits.OUTPUT_DIR, self._output)

    def _output(self) -> list[Finding]:
        checkpoint = of_run = 0
        keep = self.arguments.keep_checkpoints
        if self.size is not None and self.configuration is not None:
            from dialogpt_ds.model.memory import checkpoint_bytes, output_bytes

            number, precision = self.size.num_parameters, self.configuration.precision
            checkpoint, of_run = checkpoint_bytes(number, precision), output_bytes(number, precision, keep)
        found = limits.output_findings(self.survey.seen, self.output_dir, checkpoint, of_run, keep)
        return found + limits.shared_findings(self.survey, self.output_dir)

    def _look_at_inputs(self) -> None:
        report, known, size = self.report, self.configuration, self.size
        report.add(self._model_found)
        report.check(run_inputs.TOKENIZER, run_inputs.tokenizer_findings)
        world_size = sum(self.ranks.values())
        if known is not None:
            report.check(configuration.BATCH, lambda: configuration.batch_findings(self.parsed, known, world_size))
            report.check(run_inputs.DATA, lambda: run_inputs.data_findings(self.parsed, world_size), IMPORT_SECONDS)
            if size is not None and self.survey.seen:
                report.check(gpus.FIT, lambda: gpus.fit_findings(self.survey.seen, self.ranks, known, size))
        report.check(run_inputs.DATA, lambda: run_inputs.copy_findings(self.survey.seen))
