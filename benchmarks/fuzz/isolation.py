"""Run the trials of a group in a separate process, because a command can crash or hang this process."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.fuzz.groups import GROUPS
from benchmarks.fuzz.trial import Trial, Workbench

_LONGEST_TRIAL_S = 120.0


def run_group(name: str, inputs: int, seed: int) -> Iterator[Trial]:
    """Yield the trials of a group on the inputs 0 to ``inputs - 1``. A process that crashes or hangs is replaced.

    Raises:
        RuntimeError: a command does not accept the undamaged input.
    """
    context = multiprocessing.get_context("spawn")
    first = 0
    while first < inputs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(name, range(first, inputs), seed, theirs), daemon=True)
        process.start()
        theirs.close()
        number = None
        try:
            while ours.poll(_LONGEST_TRIAL_S):
                value = ours.recv()
                if isinstance(value, Trial):
                    yield value
                else:
                    number = value  # the number of the input whose trials begin now
            problem = f"hangs for {_LONGEST_TRIAL_S:.0f} s"
            process.kill()
            process.join()
        except EOFError:
            process.join()
            problem = f"ended the interpreter with status {process.exitcode}"
        if process.exitcode == 0:
            return
        if number is None:
            raise RuntimeError(f"{name}: a command refuses the undamaged input")
        yield Trial(name, number, "see the seed", "a command of this group", 1, problem, "no message")
        first = number + 1


def _serve(name: str, numbers: range, seed: int, connection: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(GROUPS[name], Path(folder), seed)
        for number in numbers:
            connection.send(number)
            for trial in bench.try_number(number):
                connection.send(trial)
