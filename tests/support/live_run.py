"""Start a training run in the background, to watch, signal and kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.runs import (
    REPOSITORY,
    TRAIN,
    Sections,
    child_environment,
    last_logged_step,
    ranks_command,
    train_arguments,
)

POLL_S = 0.02
HELD_TRAIN = REPOSITORY / "tests" / "support" / "held_train.py"


class LiveRun:
    """A run of ``launch/train.py`` in its own process group. Its output goes to a file.

    As a context manager, it kills all processes of the run on exit.

    Args:
        launcher: more options for torchrun. If given, a single process also runs under torchrun.
        command: a launcher to use instead of python and torchrun, without the script.
        name: the suffix of the output file, if several launchers start one run.
        hold_after: every rank waits after this step, until ``release`` is called.
        hold_in: ``step``, or ``save`` or ``evaluation`` to wait inside the save or the evaluation of this step. With
            ``step``, a signal that asks a rank to stop also ends the wait.
    """

    def __init__(
        self,
        config: str,
        run_folder: Path,
        sections: Sections,
        processes: int = 1,
        script: Path = TRAIN,
        launcher: Sequence[str] = (),
        command: Sequence[str] | None = None,
        name: str = "output",
        hold_after: int | None = None,
        hold_in: str = "step",
    ) -> None:
        self.run_folder = run_folder
        self.hold_path = run_folder.with_name(f"{run_folder.name}.hold")
        holding = {}
        if hold_after is not None:
            script = HELD_TRAIN
            self.hold_path.touch()
            holding = {
                "HOLD_AFTER": str(hold_after),
                "HOLD_FILE": str(self.hold_path),
                "HOLD_IN": hold_in,
            }
        arguments = train_arguments(config, run_folder, sections)
        whole = (
            [*command, str(script), *arguments] if command else ranks_command(processes, script, arguments, launcher)
        )
        self.script = script  # by which the ranks are recognized among the processes of the launcher
        self.output_path = run_folder.with_name(f"{run_folder.name}.{name}")
        with self.output_path.open("w") as output:
            self.process = subprocess.Popen(
                whole,
                cwd=REPOSITORY,
                env={**child_environment(), **holding},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 300) -> None:
        """Poll until the condition holds.

        Raises:
            RuntimeError: the run ended, or the time is up. The message contains the run's output.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the condition did not become true (status {self.process.returncode}):\n{self.output}"
                )
            time.sleep(POLL_S)

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the training processes by rank."""
        found = {}
        try:
            processes = [psutil.Process(self.process.pid)]
            processes += processes[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return {}
        for process in processes:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if str(self.script) in process.cmdline()[1:3]:  # launchers may put -u before the script
                    found[int(process.environ().get("RANK", "0"))] = process
        return found

    def wait_until_gone(self, ranks: dict[int, psutil.Process], timeout_s: float = 300) -> None:
        """Wait for the given processes to end, whether or not the launcher still exists.

        Raises:
            RuntimeError: a process does not end in time. The message contains the run's output.
        """
        _, alive = psutil.wait_procs(ranks.values(), timeout_s)
        if alive:
            raise RuntimeError(f"{alive} still running after {timeout_s} s:\n{self.output}")

    def wait(self, timeout_s: float = 300) -> int:
        """Wait for the launcher to end and return its exit status.

        Raises:
            RuntimeError: it does not end in time. The message contains its output.
        """
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"still running after {timeout_s} s:\n{self.output}") from None

    def kill(self) -> None:
        """Send SIGKILL to every process of the run, including ranks in sessions of their own."""
        victims = list(self.ranks().values())
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        self.process.wait()

    def last_step(self) -> int:
        """Return the last training step that the run has logged, or 0."""
        return last_logged_step(self.run_folder)

    def wait_for_step(self, step: int, timeout_s: float = 300) -> None:
        """Wait until a training step is in the metrics. Its line in the output may come later."""
        self.wait_until(lambda: self.last_step() >= step, timeout_s)

    def release(self) -> None:
        """Let a held run continue. Ranks that the launcher restarts do not wait again."""
        self.hold_path.unlink()
