"""A short rehearsal on two hosts, and the hosts themselves (``benchmarks/rehearsal``)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.rehearsal.cases import CASES, HELD_AFTER, LOST, MEGABITS, GoodRun, Rehearsal
from benchmarks.rehearsal.job import RANK_TIMEOUT_S, Job, torchrun
from tests.support.hosts import Lab, NamespacesError
from tests.support.runs import REPOSITORY, child_environment

BUILD = "from tests.support.hosts import Lab; import pathlib, sys, time; lab = Lab(2, pathlib.Path(sys.argv[1]))"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    scratch = tmp_path_factory.mktemp("rehearsal")
    try:
        Lab(1, scratch / "first").__exit__()
    except NamespacesError as error:
        pytest.skip(str(error))
    return Rehearsal(scratch / "runs")


def test_two_hosts_have_the_curve_of_one_process(rehearsal: Rehearsal) -> None:
    """The names of the hosts resolve to loopback, and the link between the hosts is slow."""
    case = GoodRun(
        2,
        torchrun(2),
        "torchrun",
        names_are_loopback=True,
        slow_host=1,
        prints=r"slow network: the links between the hosts transfer [\d.]+ to [\d.]+ MB/s",
    )
    row = case.rehearse(rehearsal)
    assert not row.problems
    rates = re.findall(r"[\d.]+(?= to| MB/s)", row.cause)
    assert rates and all(float(rate) < 1.1 * MEGABITS / 8 for rate in rates)


def test_a_cut_link_ends_the_ranks_of_both_hosts(rehearsal: Rehearsal) -> None:
    folder = rehearsal.new_run_folder()
    with rehearsal.lab(2) as lab, Job(lab, torchrun(2), "ddp", folder, rehearsal.sections, HELD_AFTER) as job:
        job.wait_until_held(HELD_AFTER)
        lab.hosts[1].cut()
        job.release()
        assert job.wait_for_ranks(lab.hosts, 120) > RANK_TIMEOUT_S
        for number, host in enumerate(lab.hosts):
            (error,) = job.errors_of(host)
            assert re.match(LOST[1 - number], error)
            assert "run the same command again" in error


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_hosts_end_with_the_process_that_built_them(
    number: signal.Signals, rehearsal: Rehearsal, tmp_path: Path
) -> None:
    code = f"{BUILD}; print('built', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "lab")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment(), text=True) as process:
        assert process.stdout and process.stdout.readline() == "built\n"
        processes = psutil.Process(process.pid).children(recursive=True)
        assert sum(each.name() == "sh" for each in processes) == 3, "the switch and two hosts"
        process.send_signal(number)
        process.wait(30)
    assert not psutil.wait_procs(processes, 30)[1]


def test_without_namespaces_the_command_prints_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.rehearsal"]
    environment = {**child_environment(), "PATH": "/nowhere"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and not result.stdout
    assert re.fullmatch(r"error: commands are missing: hostname, ip, .*\n", result.stderr)


def test_every_case_is_in_the_docs() -> None:
    page = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    missing = [name for name in CASES if f"`{name}`" not in page]
    assert not missing
