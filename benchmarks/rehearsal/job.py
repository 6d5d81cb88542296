"""Run ``launch/train.py`` on several hosts, like a user who types the same command on every host."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from data_tools.storage.atomic import hidden_partial_path
from pipeline.checkpoint.layout import GROUPS, checkpoint_folder, tensor_file
from tests.support.hosts import Host, Lab
from tests.support.live_run import POLL_S, LiveRun
from tests.support.runs import Sections, last_logged_step

#: Returns the command of a launcher for one host, without the script.
Launcher = Callable[[Host], list[str]]

MAIN_HOST = "node0"
PORT = 29500
RANK_TIMEOUT_S = 5
RUN_S = 240  # the longest time of a whole run, on a busy machine
#: An error of the program, which launchers may print after a prefix.
_ERROR = re.compile(r"^(?:\[.*?\])?:? ?(?:\[rank \d+ on \S+\] )?error: (.*)$", re.MULTILINE)


def torchrun(nodes: int | str, *options: str, variables: Sequence[str] = ()) -> Launcher:
    """Return a launcher with a c10d rendezvous on the main host, and one rank per host.

    Args:
        variables: environment variables, each as ``NAME=VALUE``.
    """

    def command(_: Host) -> list[str]:
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=rehearsal", f"--rdzv-endpoint={MAIN_HOST}:{PORT}"]
        fixed = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"]
        return ["env", *variables, *fixed, *rendezvous, *options]

    return command


def deepspeed(host: Host) -> list[str]:
    """Return the command of DeepSpeed's launcher without ssh, and write its hostfile."""
    hostfile = host.working_dir / "hostfile"
    hostfile.write_text("".join(f"{each.name} slots=1\n" for each in host.lab.hosts))
    options = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={host.lab.hosts.index(host)}"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, f"--master_addr={MAIN_HOST}"]


class Job:
    """A run on all hosts of a lab. As a context manager, it kills all its processes on exit.

    Args:
        run_folder: an absolute path.
        hold_after: every rank waits after this step until ``release`` is called.
        hold_in: ``step``, or ``save`` to wait inside the save of this step.
    """

    def __init__(
        self,
        lab: Lab,
        launcher: Launcher,
        config: str,
        run_folder: Path,
        sections: Sections,
        hold_after: int | None = None,
        *,
        hold_in: str = "step",
    ) -> None:
        self.lab = lab
        self.run_folder = run_folder
        self._launcher = launcher
        self._options = {"config": config, "run_folder": run_folder, "sections": sections}
        self._holding = {"hold_after": hold_after, "hold_in": hold_in}
        self._stack = ExitStack()
        self.commands: dict[Host, list[LiveRun]] = {host: [] for host in lab.hosts}
        with ExitStack() as failed:
            failed.push(self)
            for host in lab.hosts:
                self.start(host)
            failed.pop_all()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, host: Host) -> None:
        name = f"{host.name}-{len(self.commands[host])}"
        command = host.command(self._launcher(host))
        run = LiveRun(command=command, name=name, **self._options, **self._holding)  # type: ignore[arg-type]
        self.commands[host].append(self._stack.enter_context(run))

    def output_of(self, host: Host) -> str:
        return "".join(run.output for run in self.commands[host])

    @property
    def output(self) -> str:
        return "".join(f"[{host.name}]\n{self.output_of(host)}" for host in self.commands)

    def errors_of(self, host: Host) -> list[str]:
        """Return the errors that the ranks of a host have printed, without repetitions."""
        return list(dict.fromkeys(_ERROR.findall(self.output_of(host))))

    def last_step(self) -> int:
        """Return the last training step that the run has logged, or 0."""
        return last_logged_step(self.run_folder)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> float:
        """Poll until a condition holds, and return the seconds until then.

        Raises:
            RuntimeError: the condition does not hold in time, or all launchers have ended. The message contains the end
                of the output.
        """
        started = time.monotonic()
        while not condition():
            have_ended = self.launchers_ended(self.lab.hosts) and not condition()
            if have_ended or time.monotonic() - started > timeout_s:
                problem = "all launchers ended before" if have_ended else f"waited {timeout_s:.0f} s for"
                raise RuntimeError(f"{problem} {what}:\n{self.output[-6000:]}")
            time.sleep(POLL_S)
        return time.monotonic() - started

    def wait_until_held(self, step: int) -> None:
        """Return as soon as all ranks are held at ``step``, in the place that ``hold_in`` names."""
        if self._holding["hold_in"] == "save":
            aside = hidden_partial_path(checkpoint_folder(self.run_folder, step))
            ranks = range(len(self.lab.hosts))
            files = [aside / tensor_file(rank, group) for rank in ranks for group in GROUPS]
            self.wait_until(lambda: all(file.exists() for file in files), f"the save of step {step}")
        else:
            self.wait_until(lambda: self.last_step() >= step, f"step {step}")

    def release(self) -> None:
        self.commands[self.lab.hosts[0]][0].release()

    def wait_for_ranks(self, hosts: Iterable[Host], timeout_s: float) -> float:
        """Wait until no rank runs on the given hosts, and return the seconds until then."""
        runs = [self.commands[host][-1] for host in hosts]
        return self.wait_until(lambda: not any(run.ranks() for run in runs), "the end of the ranks", timeout_s)

    def wait_for_launchers(self, hosts: Iterable[Host], timeout_s: float) -> list[int]:
        """Wait until the launchers of the given hosts end, and return their exit statuses."""
        deadline = time.monotonic() + timeout_s
        return [self.commands[host][-1].wait(max(deadline - time.monotonic(), POLL_S)) for host in hosts]

    def wait_for_steps_after(self, step: int) -> float:
        """Wait until the run logs a later step, and return the seconds until then."""
        return self.wait_until(lambda: self.last_step() > step, f"steps after {step}", RUN_S)

    def launchers_ended(self, hosts: Iterable[Host]) -> bool:
        return all(self.commands[host][-1].process.poll() is not None for host in hosts)
