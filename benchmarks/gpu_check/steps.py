"""Run steps in child processes within a time budget, record each outcome at once, and continue in the next call.

A step is a command with a time limit. A failure does not stop the steps after it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
RESULTS_FILE = "results.json"
LOG_FILE = "log.txt"
LOGGED_LINES, LONGEST_LINE = 25, 300
TERMINATION_S = 5.0  # between SIGTERM and SIGKILL
POLL_S = 0.5

#: The values that a step measured, as JSON. The key ``problem`` says in one line why a step failed.
Figures = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A command that measures or checks one thing.

    Args:
        name: unique, and also the name of the step's folder.
        read: reads the figures from the step's folder.
        limit_s: the time after which the command is stopped and counts as failed.
        usual_s: the usual duration. If less time is left, the step does not start.
        skipped: the reason why this machine cannot run the step, or an empty text.
    """

    name: str
    command: Sequence[str]
    read: Callable[[Path], Figures]
    limit_s: float
    usual_s: float
    skipped: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Steps that do not depend on each other. They run at the same time if they do not measure time or memory."""

    title: str
    steps: Sequence[Step]
    alone: bool


class Record:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.on_change: Callable[[Record], None] = lambda record: None  # called after each change
        self._lock = threading.Lock()
        path = folder / RESULTS_FILE
        if path.exists():
            self.outcomes = json.loads(path.read_text(encoding="utf-8"))

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        with self._lock:
            self.outcomes[name] = outcome
            write_text(self.folder / RESULTS_FILE, json.dumps(self.outcomes, indent=1) + "\n")
            self.on_change(self)

    def figures(self, name: str) -> Figures:
        """Return the figures of a step, or an empty dict."""
        return dict(self.outcomes.get(name, {}).get("figures", {}))

    def status(self, name: str) -> str | None:
        """Return the status of a step, or None if the step has not been reached."""
        status: str | None = self.outcomes.get(name, {}).get("status")
        return status


class Runner:
    """Runs the steps that have no outcome yet, until the time budget is used up.

    A step whose command has changed since an earlier call runs again.

    Args:
        deadline: the value of ``time.monotonic()`` at which everything must have ended.
        workers: the number of steps that run at the same time in a stage that is not ``alone``.
        repeat_failed: whether to repeat the steps that failed in an earlier call.
    """

    def __init__(self, record: Record, deadline: float, workers: int, *, repeat_failed: bool = False) -> None:
        self.record = record
        self.deadline = deadline
        self.workers = workers
        self.repeat_failed = repeat_failed
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run_one(self, step: Step) -> None:
        try:
            self._run_step(step)
        except BaseException:
            self.stop()
            raise

    def run(self, stages: Sequence[Stage]) -> None:
        """Run all stages in order. An exception, such as KeyboardInterrupt, stops the running children."""
        try:
            for stage in stages:
                with ThreadPoolExecutor(1 if stage.alone else self.workers) as pool:
                    try:
                        futures = [pool.submit(self._run_step, step) for step in stage.steps]
                        # A signal that arrives right before an endless wait does not end the wait. Hence the timeout.
                        while wait(futures, timeout=POLL_S).not_done:
                            continue
                        for future in futures:
                            future.result()
                    except BaseException:
                        self.stop()
                        raise
        finally:
            self.stop()

    def stop(self) -> None:
        """Start no further step, and stop the running children. Their steps get no outcome."""
        self._stopping = True
        for process in list(self._running):
            stop_tree(process)

    def _run_step(self, step: Step) -> None:
        status = self.record.status(step.name)
        has_outcome = status == PASSED or (status == FAILED and not self.repeat_failed)
        is_same = has_outcome and self.record.outcomes[step.name].get("command") == shlex.join(step.command)
        if is_same:
            return
        if step.skipped:
            self.record.add(step.name, {"status": SKIPPED, "problem": step.skipped})
            return
        left_s = self.deadline - time.monotonic() - TERMINATION_S
        if self._stopping or left_s < min(step.usual_s, step.limit_s):
            return
        changed = ", again: its command has changed" if has_outcome else ""
        print(f"{step.name} ({left_s:,.0f} s left){changed}", flush=True)
        outcome = self._outcome(step, min(step.limit_s, left_s))
        if outcome is not None:
            problem = f": {outcome['problem']}" if outcome["problem"] else ""
            print(f"{step.name}: {outcome['status']} in {outcome['seconds']:.0f} s{problem}", flush=True)
            self.record.add(step.name, outcome)

    def _outcome(self, step: Step, limit_s: float) -> dict[str, Any] | None:
        """Run a step and return its outcome. Return None if the whole check ran out of time during the step."""
        folder = self.record.folder / step.name
        shutil.rmtree(folder, ignore_errors=True)  # an earlier call may have been interrupted
        folder.mkdir(parents=True)
        started = time.monotonic()
        status = self._run_command(step, folder, limit_s)
        outcome: dict[str, Any] = {
            "status": FAILED,
            "problem": "",
            "seconds": round(time.monotonic() - started, 1),
            "ended": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "command": shlex.join(step.command),
        }
        if self._stopping or (status is None and limit_s < step.limit_s):
            return None
        if status is None:
            outcome["problem"] = f"still running after {limit_s:.0f} s"
        else:
            try:
                outcome["figures"] = step.read(folder)
                outcome["problem"] = outcome["figures"].get("problem", "")
            except Exception as error:  # noqa: BLE001 - whatever a step has written, the next step must run
                outcome["problem"] = "" if status else f"no result: {type(error).__name__}: {error}"
            if status and not outcome["problem"]:
                outcome["problem"] = f"exit status {status}"
        if not outcome["problem"]:
            outcome["status"] = PASSED
        else:
            outcome["log"] = last_lines(folder / LOG_FILE)
        return outcome

    def _run_command(self, step: Step, folder: Path, limit_s: float) -> int | None:
        """Return the exit status, or None if the command was stopped at the limit."""
        environment = {**os.environ, **step.environment}
        with (folder / LOG_FILE).open("w") as log:
            process = subprocess.Popen(list(step.command), stdout=log, stderr=log, env=environment)
        self._running.add(process)
        try:
            return process.wait(0 if self._stopping else limit_s)
        except subprocess.TimeoutExpired:
            stop_tree(process)
            return None
        finally:
            self._running.discard(process)


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all its descendants with SIGTERM, and later with SIGKILL."""
    try:
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for member in tree:
            try:
                send(member)
            except psutil.NoSuchProcess:
                continue
        _, tree = psutil.wait_procs(tree, timeout=TERMINATION_S)


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log, each shortened."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:LONGEST_LINE] for line in lines if line.strip()][-LOGGED_LINES:]


def write_text(path: Path, text: str) -> None:
    """Replace a file at once, so that a killed process leaves the old or the new text."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
