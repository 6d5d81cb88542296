"""Ranks without the seconds that importing torch takes: a process that has imported it forks them.

``RankServer`` starts ``python -m tests.support.rank_server`` and talks to it in lines of JSON. A rank runs as it would
under torchrun: the script is ``__main__``, with its arguments and environment, in a process of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

#: What takes long to import; nothing of it may start a thread.
PRELOADED = ("pipeline.training.run", "torch.distributed.fsdp", "deepspeed")
GRACE_S = 30.0  # torchrun's, between SIGTERM and SIGKILL for the ranks that are left


class RankServer:
    """The caller's side. Threads may share it; it ends with the process that made it. For ranks on the CPU.

    Args:
        folder: where ranks run, and what they import.
        environment: theirs; of it what torch reads at its import cannot be changed later.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_server"],
            cwd=folder,
            env={**environment, "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._lock = threading.Lock()
        self._statuses: dict[int, Future[int]] = {}
        threading.Thread(target=self._read_statuses, daemon=True).start()

    def run(
        self,
        processes: int,
        script: Path,
        arguments: Sequence[str],
        environment: dict[str, str],
        outputs: Path,
        timeout_s: float,
    ) -> int:
        """Run a script to its end, as ``processes`` ranks if there are several.

        Args:
            outputs: a folder for ``stdout`` and ``stderr``, which the ranks share.

        Returns:
            The exit status; of several ranks the first that is not 0.

        Raises:
            TimeoutError: they are killed.
        """
        port = str(free_port())
        pids: list[int] = []
        statuses: list[Future[int]] = []
        for rank in range(processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            launched = (
                {**{name: str(value) for name, value in world.items()}, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
                if processes > 1
                else {}
            )
            pid, status = self._fork([str(script), *arguments], {**environment, **launched}, outputs)
            pids.append(pid)
            statuses.append(status)
        return _first_failure(pids, statuses, timeout_s)

    def _fork(self, argv: list[str], variables: dict[str, str], outputs: Path) -> tuple[int, Future[int]]:
        request = {"argv": argv, "variables": variables, "outputs": str(outputs)}
        status: Future[int] = Future()
        with self._lock:
            assert self._server.stdin
            number = len(self._statuses)
            self._statuses[number] = status
            self._pid_known = threading.Event()
            self._server.stdin.write(json.dumps({"number": number, **request}) + "\n")
            if not self._pid_known.wait(300):
                raise RuntimeError("the rank server does not answer")
            return self._pid, status

    def _read_statuses(self) -> None:
        assert self._server.stdout
        for line in self._server.stdout:
            answer = json.loads(line)
            if "pid" in answer:
                self._pid = answer["pid"]
                self._pid_known.set()
            else:
                self._statuses[answer["number"]].set_result(answer["status"])


def _first_failure(pids: list[int], statuses: list[Future[int]], timeout_s: float) -> int:
    """Wait for all ranks; once one has failed, the others get SIGTERM and then SIGKILL, as under torchrun."""
    pending = set(statuses)
    failed = 0
    while pending:
        done, pending = wait(pending, GRACE_S if failed else timeout_s, "FIRST_COMPLETED")
        if not done:
            _signal(pids, statuses, signal.SIGKILL)
            wait(pending)
            if not failed:
                raise TimeoutError(f"not at its end after {timeout_s} s")
            return failed
        failures = [status.result() for status in done if status.result()]
        if failures and not failed:
            failed = failures[0]
            _signal(pids, statuses, signal.SIGTERM)
    return failed


def _signal(pids: list[int], statuses: list[Future[int]], number: int) -> None:
    for pid, status in zip(pids, statuses, strict=True):
        if not status.done():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def serve() -> None:
    """Fork a rank for each line of standard input; say its pid, and its status when it has ended."""
    import importlib

    for module in PRELOADED:
        importlib.import_module(module)
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    numbers: dict[int, int] = {}
    signal.signal(signal.SIGCHLD, lambda *_: _report_ended(numbers, answers))
    for line in os.fdopen(requests, closefd=False):
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            os.close(requests)
            os.close(answers)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            _become_rank(request["argv"], request["variables"], Path(request["outputs"]))
        numbers[pid] = request["number"]
        _answer(answers, {"pid": pid})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for pid in list(numbers):  # the caller is gone
        os.kill(pid, signal.SIGKILL)


def _report_ended(numbers: dict[int, int], answers: int) -> None:
    while numbers:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # another signal came in between, and its handler has seen to the rest
            return
        if pid == 0:
            return
        _answer(answers, {"number": numbers.pop(pid), "status": os.waitstatus_to_exitcode(status)})


def _answer(answers: int, value: dict[str, int]) -> None:
    os.write(answers, json.dumps(value).encode() + b"\n")


def _become_rank(argv: list[str], variables: dict[str, str], outputs: Path) -> NoReturn:
    """Run the script, and leave as the interpreter would."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(outputs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = argv
    status = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        if raised := sys.exc_info()[1]:
            traceback.print_exception(raised)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
