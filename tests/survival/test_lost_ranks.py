"""If a rank is killed or hangs, the others exit and name it, and the launcher restarts all ranks."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

from pipeline.distributed.rendezvous import free_port
from tests.support.live_run import LiveRun
from tests.support.runs import Curve, Sections, merged
from tests.survival.conftest import EVERY_STEPS, assert_same_curve

HELD_AFTER = 2 * EVERY_STEPS + 1  # the second save has begun by then, so the first is complete


def test_torchrun_restarts_after_a_rank_was_killed(sections: Sections, tmp_path: Path, whole: Curve) -> None:
    """The restart continues the run even with --resume none."""
    folder = tmp_path / "run"
    fresh = merged(sections, {"checkpoint": {"resume": "none"}})
    with LiveRun("ddp", folder, fresh, 2, launcher=["--max-restarts=1"], hold_after=HELD_AFTER) as run:
        run.wait_for_step(HELD_AFTER)
        pid = run.ranks()[0].pid
        run.ranks()[0].kill()
        run.release()
        assert run.wait() == 0
        assert re.search(rf"error: lost rank 0 \(.*, pid {pid}\)", run.output)
        assert re.search(r"start +continues .*step_0*[48], saved with ddp, world size 2$", run.output, re.MULTILINE)
    assert_same_curve(folder, whole)


def test_a_rank_that_hangs_is_named_in_time(sections: Sections, tmp_path: Path) -> None:
    """Under torchrun, rank 0 does not serve the store. ``test_lost_evaluation`` has ranks that serve it."""
    timeout_s = 3
    folder = tmp_path / "run"
    hurried = merged(sections, {"run": {"rank_timeout_s": timeout_s}})
    with LiveRun("zero2", folder, hurried, processes=2, hold_after=2) as run:
        run.wait_for_step(2)
        ranks = run.ranks()
        ranks[0].suspend()
        run.release()
        run.wait_until_gone({1: ranks[1]})
        assert "error: lost rank 0 (" in run.output
        assert f"silent for {timeout_s} s" in run.output


def test_an_elastic_run_continues_on_the_remaining_nodes(sections: Sections, tmp_path: Path, whole: Curve) -> None:
    """Start two agents of torchrun --nnodes 1:2, and kill one of them with its rank."""
    folder = tmp_path / "run"
    port = free_port()
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=elastic --max-restarts=3"
    options = "--rdzv-conf=last_call_timeout=15,join_timeout=120 --nnodes=1:2 --nproc-per-node=1 --local-addr=localhost"
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous.split(), *options.split()]
    with LiveRun("fsdp", folder, sections, command=launcher, hold_after=HELD_AFTER) as first:
        first.wait_until(lambda: is_open(port))  # the first one serves the rendezvous, and must not be killed
        second = LiveRun("fsdp", folder, sections, command=launcher, name="second", hold_after=HELD_AFTER)
        with second:
            first.wait_for_step(HELD_AFTER)
            assert "world size 2" in first.output + second.output
        first.release()
        assert first.wait(240) == 0
        assert "world size 1" in first.output
    assert_same_curve(folder, whole)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0
