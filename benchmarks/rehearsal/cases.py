"""Define runs on several hosts that succeed, and runs in which a host or a link is lost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.rehearsal.job import RANK_TIMEOUT_S, RUN_S, Job, Launcher, deepspeed, torchrun
from pipeline.checkpoint.layout import list_checkpoints, step_of
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.hosts import Host, Lab
from tests.support.runs import TINY_BYTE_RUN, Curve, Sections, curve_of, make_byte_corpus, merged, read_curve

STEPS, EVERY_STEPS = 14, 4
HELD_AFTER = 2 * EVERY_STEPS + 1  # the second save has begun by then, so the first is complete
HELD_SAVE = 2 * EVERY_STEPS
#: The ranks must end within this time after a fault. A rank first waits for ``RANK_TIMEOUT_S``, and then at most ten
#: seconds for answers of other ranks.
ENDS_WITHIN_S = RANK_TIMEOUT_S + 15
LAUNCHERS_END_WITHIN_S = 60  # see ``TCP_RETRIES``
MEGABITS = 20
#: What the other rank prints if a rank cannot be reached. The store is on the host of rank 0.
LOST = {
    0: r"lost rank 0( \(node0, pid \d+\)|, or the launcher on its node), silent for \d+ s",
    1: r"lost rank 1 \(node1, pid \d+\), silent for \d+ s",
}

SECTIONS: Sections = merged(
    TINY_BYTE_RUN,
    {
        "run": {"rank_timeout_s": RANK_TIMEOUT_S},
        "model": {"dropout": 0.1},
        "batch": {"tokens_per_step": 192, "micro_batch_size": 1},
        "schedule": {"max_steps": STEPS},
        "checkpoint": {"every_steps": EVERY_STEPS},
        "evaluation": {"every_steps": 5},
    },
)


@dataclass
class Row:
    case: str
    hosts: int
    launcher: str
    ranks_end_s: float | None = None  # from the fault to the end of the last rank that still ran
    launchers_end_s: float | None = None  # from the fault to the end of the last launcher that still ran
    continues_s: float | None = None  # from the fault to the first step that the run logged after it
    cause: str = ""  # what the run printed
    loss_difference: float | None = None  # the largest difference of a step from the run of one process, in nats
    problems: list[str] = field(default_factory=list)

    def expect(self, *, cause: str, within: str) -> None:
        """Record the first match of the pattern ``cause`` in ``within``. Without a match, record a problem."""
        if match := re.search(cause, within, re.MULTILINE):
            self.cause = f"{self.cause}; {match[0]}" if self.cause else match[0]
        else:
            self.problems.append(f"did not print {cause!r}: {within[-3000:]}")

    def compare(self, run_folder: Path, reference: Curve) -> None:
        curve = read_curve(run_folder)
        if len(curve.losses) != STEPS:
            self.problems.append(f"logged {len(curve.losses)} of {STEPS} steps")
            return
        self.loss_difference = curve.largest_loss_difference(reference)
        if self.loss_difference > LOSS_TOLERANCE["fp32"]:
            self.problems.append("the curve differs from that of one process")


class Rehearsal:
    """What all cases share: data, the config, and the curve of one process.

    Args:
        scratch: an empty folder.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._numbers = itertools.count()
        data = {"data": {"path": str(make_byte_corpus(scratch / "data"))}}
        self.sections = merged(SECTIONS, data)
        self.reference = curve_of("ddp", scratch / "reference", self.sections)

    def lab(self, hosts: int, *, names_are_loopback: bool = False) -> Lab:
        folder = self._scratch / f"lab-{next(self._numbers)}"
        return Lab(hosts, folder, names_are_loopback=names_are_loopback)

    def new_run_folder(self) -> Path:
        """Return the path of a run folder that all hosts share."""
        return self._scratch / f"run-{next(self._numbers)}"


@dataclass(frozen=True)
class GoodRun:
    hosts: int
    launcher: Launcher
    launcher_name: str
    config: str = "ddp"
    case: str = "no fault"
    names_are_loopback: bool = False
    slow_host: int | None = None  # the host whose link is limited to ``MEGABITS``
    prints: str | None = None  # a pattern of what the run must print

    def rehearse(self, rehearsal: Rehearsal) -> Row:
        row = Row(self.case, self.hosts, self.launcher_name)
        with rehearsal.lab(self.hosts, names_are_loopback=self.names_are_loopback) as lab:
            if self.slow_host is not None:
                lab.hosts[self.slow_host].limit(MEGABITS)
            with Job(lab, self.launcher, self.config, rehearsal.new_run_folder(), rehearsal.sections) as job:
                finish(job, row, rehearsal.reference)
                if self.prints:
                    row.expect(cause=self.prints, within=job.output)
        return row


def finish(job: Job, row: Row, reference: Curve) -> None:
    statuses = job.wait_for_launchers(job.lab.hosts, RUN_S)
    if any(statuses):
        row.problems.append(f"the launchers ended with status {statuses}: {job.output[-3000:]}")
    row.compare(job.run_folder, reference)


@dataclass(frozen=True)
class Fault:
    """A fault that ends a run. The same command then continues the run."""

    case: str
    launcher: Launcher
    launcher_name: str
    inject: Callable[[Sequence[Host]], None]
    causes: dict[int, str]  # the number of a host that survives -> a pattern of the error that it must print
    config: str = "ddp"
    in_save: bool = False

    def rehearse(self, rehearsal: Rehearsal) -> Row:
        """Train on two hosts until the fault ends the run. Then repeat the command, and compare the loss curve."""
        row = Row(self.case, 2, self.launcher_name)
        run_folder = rehearsal.new_run_folder()
        arguments = (self.launcher, self.config, run_folder)
        sections = rehearsal.sections
        if self.in_save:  # the main thread waits for the end of the save
            sections = merged(sections, {"checkpoint": {"asynchronous": False}})
        held, hold_in = (HELD_SAVE, "save") if self.in_save else (HELD_AFTER, "step")
        with rehearsal.lab(2) as lab, Job(lab, *arguments, sections, held, hold_in=hold_in) as job:
            job.wait_until_held(held)
            survivors = [lab.hosts[number] for number in self.causes]
            self.inject(lab.hosts)
            job.release()
            self._measure_end(job, row, survivors)
            for number, cause in self.causes.items():
                row.expect(cause=cause, within="\n".join(job.errors_of(lab.hosts[number])) or job.output)
        saved = [step_of(checkpoint) for checkpoint in list_checkpoints(run_folder)]
        if self.in_save and HELD_SAVE in saved:
            row.problems.append("the interrupted save is complete")
        with rehearsal.lab(2) as lab, Job(lab, *arguments, sections) as job:
            finish(job, row, rehearsal.reference)
        return row

    def _measure_end(self, job: Job, row: Row, survivors: list[Host]) -> None:
        row.ranks_end_s = job.wait_for_ranks(survivors, RUN_S)
        what = f"the launchers of {', '.join(host.name for host in survivors)}"
        row.launchers_end_s = row.ranks_end_s + job.wait_until(lambda: job.launchers_ended(survivors), what, RUN_S)
        for who, time_s, limit_s in (
            ("ranks", row.ranks_end_s, ENDS_WITHIN_S),
            ("launchers", row.launchers_end_s, LAUNCHERS_END_WITHIN_S),
        ):
            if time_s > limit_s:
                row.problems.append(f"the {who} ended after {time_s:.0f} s, not within {limit_s} s")


def link_returns(rehearsal: Rehearsal) -> Row:
    """Cut a host's link during a step. After all ranks end, repair the link. The launchers start the ranks again."""
    row = Row("a link is cut in a step, and returns", 2, "torchrun --max-restarts=3")
    restarting = torchrun(2, "--max-restarts=3")
    run_folder = rehearsal.new_run_folder()
    with rehearsal.lab(2) as lab, Job(lab, restarting, "ddp", run_folder, rehearsal.sections, HELD_AFTER) as job:
        job.wait_until_held(HELD_AFTER)
        lab.hosts[1].cut()
        job.release()
        row.ranks_end_s = job.wait_for_ranks(lab.hosts, RUN_S)
        lab.hosts[1].restore()
        row.continues_s = row.ranks_end_s + job.wait_for_steps_after(HELD_AFTER)
        row.expect(cause=LOST[1], within=job.output_of(lab.hosts[0]))
        row.expect(cause=LOST[0], within=job.output_of(lab.hosts[1]))
        finish(job, row, rehearsal.reference)
    return row


def host_returns(rehearsal: Rehearsal) -> Row:
    """Lose one of the two hosts of an elastic run. The run continues on the other host, and later on both."""
    row = Row("a host is lost, and returns", 2, "torchrun --nnodes=1:2")
    # Otherwise, the launcher that was not restarted does not publish the address of rank 0 to the new one.
    own_store = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    waiting = "--rdzv-conf=last_call_timeout=5,join_timeout=120"
    elastic = torchrun("1:2", "--max-restarts=3", waiting, variables=own_store)
    run_folder = rehearsal.new_run_folder()
    with rehearsal.lab(2) as lab, Job(lab, elastic, "ddp", run_folder, rehearsal.sections, HELD_AFTER) as job:
        main, lost = lab.hosts
        job.wait_until_held(HELD_AFTER)
        lost.power_off()
        row.continues_s = job.wait_until(lambda: "world size 1" in job.output_of(main), "one host", RUN_S)
        row.expect(cause=LOST[1], within=job.output_of(main))
        lost.boot()
        job.start(lost)
        job.wait_until(lambda: job.output.count("world size 2") == 2, "the return of the host", RUN_S)
        job.release()
        finish(job, row, rehearsal.reference)
        row.expect(cause=r"continues \S*step_0*\d+$", within=job.output)
        row.cause = row.cause.replace(f"{run_folder}/checkpoints/", "")
    return row


def folder_not_shared(rehearsal: Rehearsal) -> Row:
    """Start a run in a folder on the local disks of the hosts."""
    row = Row("the run folder is not shared", 2, "torchrun")
    with rehearsal.lab(2) as lab:
        run_folder = lab.local_disk / "run"
        with Job(lab, torchrun(2), "ddp", run_folder, rehearsal.sections) as job:
            row.ranks_end_s = job.wait_until(lambda: job.launchers_ended(lab.hosts), "launchers", RUN_S)
            row.launchers_end_s = row.ranks_end_s
            folder = re.escape(str(run_folder))
            row.expect(cause=f"run.out_dir: {folder} of rank 1 on node1 and {folder} of rank 0", within=job.output)
            row.cause = row.cause.replace(str(run_folder), "/local/run")
    return row


CASES: dict[str, Callable[[Rehearsal], Row]] = {
    "torchrun-2": GoodRun(2, torchrun(2), "torchrun").rehearse,
    "torchrun-4": GoodRun(4, torchrun(4), "torchrun", "fsdp").rehearse,
    "deepspeed-2": GoodRun(2, deepspeed, "deepspeed --no_ssh", "zero2").rehearse,
    "loopback": GoodRun(
        2, torchrun(2), "torchrun", case="host names resolve to loopback", names_are_loopback=True
    ).rehearse,
    "slow-link": GoodRun(
        4,
        torchrun(4),
        "torchrun",
        case=f"the link of node2 is limited to {MEGABITS} Mbit/s",
        slow_host=2,
        prints=r"slow link: node2 .*",
    ).rehearse,
    "cut-in-step": Fault(
        "link cut in a step",
        torchrun(2),
        "torchrun",
        lambda hosts: hosts[1].cut(),
        {0: LOST[1], 1: LOST[0]},
    ).rehearse,
    "cut-in-save": Fault(
        "link cut in a save",
        torchrun(2),
        "torchrun",
        lambda hosts: hosts[1].cut(),
        {0: LOST[1], 1: LOST[0]},
        in_save=True,
    ).rehearse,
    "killed": Fault(
        "all processes of a host are killed",
        torchrun(2),
        "torchrun",
        lambda hosts: hosts[1].kill(),
        {0: r"lost rank 1 \(node1, pid \d+\)"},
    ).rehearse,
    "killed-deepspeed": Fault(
        "all processes of a host are killed",
        deepspeed,
        "deepspeed --no_ssh",
        lambda hosts: hosts[1].kill(),
        {0: r"lost rank 1 \(node1, pid \d+\)"},
        config="zero2",
    ).rehearse,
    "main-lost": Fault(
        "the host of rank 0 is lost",
        torchrun(2),
        "torchrun",
        lambda hosts: hosts[0].power_off(),
        {1: LOST[0]},
    ).rehearse,
    "link-returns": link_returns,
    "host-returns": host_returns,
    "not-shared": folder_not_shared,
}
