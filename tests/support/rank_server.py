"""Start ranks without importing torch each time: a server process that has imported it forks them.

``RankServer`` starts ``python -m tests.support.rank_server`` and exchanges lines of JSON with it. A rank is a separate
process whose ``__main__`` is the script, as under torchrun.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from pipeline.distributed.rendezvous import free_port

#: Modules that take long to import. They must not start threads, because the server forks.
PRELOADED = (
    "pipeline.training.run",
    "pipeline.backends.ddp",
    "pipeline.backends.fsdp",
    "pipeline.backends.deepspeed_zero",
    "deepspeed.runtime.superoffload.superoffload_stage3",  # engines import these three
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "torch._inductor.compile_fx",  # DeepSpeed imports most of it, and FSDP and DDP on several ranks some of it
    "torch.utils.tensorboard",
)
ANSWER_S = 600.0  # for the imports, and for a build of an extension
GRACE_S = 30.0  # between SIGTERM and SIGKILL for the remaining ranks, as in torchrun


class RankServer:
    """Runs scripts on CPU ranks. Threads may share it. The server ends with the client's process.

    Args:
        folder: the working directory, from which the ranks import the project.
        environment: the environment of the server. Variables that torch reads at import cannot be changed later.
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
        folder: Path | None = None,
    ) -> int:
        """Run a script to its end on one or several ranks.

        Args:
            outputs: a folder for the files ``stdout`` and ``stderr``, which the ranks share.
            folder: the working directory of the ranks. None means that of the server.

        Returns:
            The exit status, or the first status other than 0 if there are several ranks.

        Raises:
            TimeoutError: the ranks did not end in time and were killed.
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
            request = {
                "argv": [str(script), *arguments],
                "variables": {**environment, **launched},
                "outputs": str(outputs),
                "folder": str(folder or "."),
            }
            pid, status = self._fork(request)
            pids.append(pid)
            statuses.append(status)
        return _first_failure(pids, statuses, timeout_s)

    def _fork(self, request: dict[str, Any]) -> tuple[int, Future[int]]:
        status: Future[int] = Future()
        with self._lock:
            assert self._server.stdin
            number = len(self._statuses)
            self._statuses[number] = status
            self._pid_known = threading.Event()
            self._server.stdin.write(json.dumps({"number": number, **request}) + "\n")
            if self._server.poll() is not None or not self._pid_known.wait(ANSWER_S):
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
        for status in self._statuses.values():
            if not status.done():
                status.set_exception(RuntimeError("the rank server has ended"))


def _first_failure(pids: list[int], statuses: list[Future[int]], timeout_s: float) -> int:
    """Wait for all ranks. If one fails, send the others SIGTERM and then SIGKILL, as torchrun does."""
    pending = set(statuses)
    failed = 0
    while pending:
        done, pending = wait(pending, GRACE_S if failed else timeout_s, "FIRST_COMPLETED")
        if not done:
            _signal(pids, statuses, signal.SIGKILL)
            wait(pending)
            if not failed:
                raise TimeoutError(f"still running after {timeout_s} s")
            return failed
        failures = [status.result() for status in done if status.result()]
        if failures and not failed:
            failed = failures[0]
            _signal(pids, statuses, signal.SIGTERM)
            _signal(pids, statuses, signal.SIGCONT)  # a suspended rank receives no SIGTERM
    return failed


def _signal(pids: list[int], statuses: list[Future[int]], number: int) -> None:
    for pid, status in zip(pids, statuses, strict=True):
        if not status.done():
            with suppress(ProcessLookupError):  # the rank has just ended
                os.kill(pid, number)


def shorten_ceilings() -> None:
    """Let the runs of this process and its forks measure one small matrix product at the start and at evaluations.

    Otherwise they measure for 0.2 seconds, which is longer than a tiny model trains.
    """
    from pipeline.hardware.matmul_ceiling import measure_matmul_ceiling

    mock.patch(
        "pipeline.training.throughput.measure_matmul_ceiling",
        lambda device, dtype, *_: measure_matmul_ceiling(device, dtype, seconds=0.0),
    ).start()


def serve() -> None:
    """Fork a rank for each line of standard input. Answer with its pid, and with its status when it has ended."""
    import importlib

    for module in PRELOADED:
        importlib.import_module(module)
    from pipeline.backends.deepspeed_zero import cpu_adam_problem

    shorten_ceilings()
    gc.freeze()  # the ranks collect garbage, and need not look at what was imported
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # what this process prints is no answer
    numbers: dict[int, int] = {}
    offloading: set[int] = set()  # requests whose ranks use DeepSpeed's CPUAdam, unless they fail before
    has_built_adam = False

    def report_ended(*_: object) -> None:
        nonlocal has_built_adam
        succeeded = _report_ended(numbers, answers)
        has_built_adam = has_built_adam or not offloading.isdisjoint(succeeded)

    signal.signal(signal.SIGCHLD, report_ended)
    for line in os.fdopen(requests, closefd=False):
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if "train" in request["argv"][0] and any("offload" in argument for argument in request["argv"]):
            offloading.add(request["number"])
            if has_built_adam:
                cpu_adam_problem()  # loads DeepSpeed's CPUAdam once for all later ranks, which takes 3 s of CPU time
        pid = os.fork()
        if pid == 0:
            os.close(requests)
            os.close(answers)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            os.chdir(request["folder"])
            _become_rank(request["argv"], request["variables"], Path(request["outputs"]))
        numbers[pid] = request["number"]
        _answer(answers, {"pid": pid})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for pid in list(numbers):  # the client has ended
        os.kill(pid, signal.SIGKILL)


def _report_ended(numbers: dict[int, int], answers: int) -> set[int]:
    """Report the ranks that have ended. Return the numbers of the requests whose rank has succeeded."""
    succeeded = set()
    while numbers:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # the handler of a later signal has already reported all ranks
            break
        if pid == 0:
            break
        number = numbers.pop(pid)
        if status == 0:
            succeeded.add(number)
        _answer(answers, {"number": number, "status": os.waitstatus_to_exitcode(status)})
    return succeeded


def _answer(answers: int, value: dict[str, int]) -> None:
    os.write(answers, json.dumps(value).encode() + b"\n")


def _become_rank(argv: list[str], variables: dict[str, str], outputs: Path) -> NoReturn:
    """Run the script in this forked process and exit as the interpreter would."""
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
