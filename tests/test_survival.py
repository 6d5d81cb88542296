"""What ends a run, and what does not: signals, lost ranks, bad steps, full disks, a second run in the folder.

Real runs in processes of their own. Each continues to the curve of the run that nothing happened to.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.agreement import LOSS_TOLERANCE
from benchmarks.chaos import Outcome, survive
from benchmarks.chaos import sections_of as chaos_sections
from benchmarks.live_run import LiveRun
from benchmarks.runs import (
    REPOSITORY,
    TINY_RUN,
    TRAIN,
    Curve,
    Sections,
    child_environment,
    curve_of,
    make_corpus,
    merged,
    read_curve,
    train_arguments,
    train_run,
)
from pipeline.checkpoint import find_damage, list_checkpoints, read_state
from pipeline.metrics import read_metrics

FAULTY_TRAIN = REPOSITORY / "benchmarks" / "faulty_train.py"
STEPS, EVERY_STEPS = 14, 4


@pytest.fixture(scope="module")
def sections(corpus: Path) -> Sections:
    return merged(
        TINY_RUN,
        {
            "model": {"dropout": 0.1},
            "data": {"path": str(corpus)},
            "batch": {"tokens_per_step": 192, "micro_batch_size": 1},
            "schedule": {"max_steps": STEPS},
            "checkpoint": {"every_steps": EVERY_STEPS},
            "evaluation": {"every_steps": 5},
        },
    )


@pytest.fixture(scope="module")
def whole(sections: Sections, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return curve_of("ddp", tmp_path_factory.mktemp("whole"), sections)


def steps_of(run_folder: Path) -> list[int]:
    return [read_state(folder)[0].step for folder in list_checkpoints(run_folder)]


def assert_same_curve(run_folder: Path, whole: Curve) -> None:
    curve = read_curve(run_folder)
    assert len(curve.losses) == len(whole.losses), "a gap or a duplicate"
    assert curve.largest_loss_difference(whole) <= LOSS_TOLERANCE["fp32"]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
    def test_a_signal_ends_the_run_after_a_save(
        self, number: signal.Signals, sections: Sections, tmp_path: Path, whole: Curve
    ) -> None:
        folder = tmp_path / "run"
        with LiveRun("ddp", folder, sections) as run:
            run.wait_for_step(2)
            run.process.send_signal(number)
            assert run.wait() == 128 + number
            assert f"{number.name} received: stopped after step" in run.output
            assert "error" not in run.output and "Traceback" not in run.output
        (last,) = list_checkpoints(folder)
        assert find_damage(last) is None
        assert read_state(last)[0].step == max(row["step"] for row in read_metrics(folder))
        continued = curve_of("ddp", folder, sections)
        assert continued == whole, "continued on the same side: bit by bit"

    @pytest.mark.parametrize("backend", ["fsdp", "zero3"])
    def test_a_signal_to_one_rank_stops_all_after_the_same_step(
        self, backend: str, sections: Sections, tmp_path: Path, whole: Curve
    ) -> None:
        folder = tmp_path / "run"
        with LiveRun(backend, folder, sections, processes=2) as run:
            run.wait_for_step(2)
            run.ranks()[1].send_signal(signal.SIGUSR1)
            assert run.wait() != 0
            assert run.output.count("SIGUSR1 received: stopped after step") == 1
            assert "exitcode: 138" in run.output.replace("exitcode  : 138", "exitcode: 138")
        assert find_damage(list_checkpoints(folder)[-1]) is None
        train_run("ddp", folder, sections)
        assert_same_curve(folder, whole)

    def test_a_signal_to_torchrun_reaches_the_ranks(self, sections: Sections, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        with LiveRun("ddp", folder, sections, processes=2) as run:
            run.wait_for_step(2)
            run.process.send_signal(signal.SIGTERM)
            assert run.wait() != 0
            assert "SIGTERM received: stopped after step" in run.output
        assert len(list_checkpoints(folder)) == 1

    def test_ctrl_c_under_deepspeed(self, sections: Sections, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", str(TRAIN)]
        with LiveRun("zero2", folder, sections, command=deepspeed) as run:
            run.wait_for_step(2)
            ranks = run.ranks()
            os.killpg(run.process.pid, signal.SIGINT)  # a terminal signals all of its processes
            run.wait()
            run.wait_until_gone(ranks)
            assert "SIGINT received: stopped after step" in run.output
        assert find_damage(list_checkpoints(folder)[-1]) is None


class TestLostRanks:
    @pytest.mark.parametrize("victim", [0, 1])
    def test_torchrun_continues_by_itself_after_a_rank_was_killed(
        self, victim: int, sections: Sections, tmp_path: Path, whole: Curve
    ) -> None:
        folder = tmp_path / "run"
        with LiveRun("ddp", folder, sections, processes=2, launcher=["--max-restarts=1"]) as run:
            run.wait_for_step(EVERY_STEPS + 2)
            pid = run.ranks()[victim].pid
            run.ranks()[victim].kill()
            assert run.wait() == 0
            assert re.search(rf"error: lost rank {victim} \(.*, pid {pid}\)", run.output)
            assert re.search(r"start +continues .*step_0*4$", run.output, re.MULTILINE)
        assert_same_curve(folder, whole)

    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_rank_that_hangs_is_named_in_time(self, victim: int, sections: Sections, tmp_path: Path) -> None:
        timeout_s = 3
        folder = tmp_path / "run"
        hurried = merged(sections, {"run": {"rank_timeout_s": timeout_s}, "schedule": {"max_steps": 1000}})
        with LiveRun("zero2", folder, hurried, processes=2) as run:
            run.wait_for_step(2)
            ranks = run.ranks()
            ranks[victim].suspend()
            stopped_at = time.monotonic()
            run.wait_until_gone({1 - victim: ranks[1 - victim]})
            assert time.monotonic() - stopped_at < timeout_s + 10
            assert f"error: lost rank {victim} (" in run.output
            assert f"silent for {timeout_s} s" in run.output

    def test_none_starts_from_scratch_once_only(self, sections: Sections, tmp_path: Path, whole: Curve) -> None:
        """With --resume none, too, a restart by the launcher continues."""
        folder = tmp_path / "run"
        fresh = merged(sections, {"checkpoint": {"resume": "none"}})
        with LiveRun("fsdp", folder, fresh, processes=1, launcher=["--max-restarts=1"]) as run:
            run.wait_for_step(EVERY_STEPS + 2)
            run.ranks()[0].kill()
            assert run.wait() == 0
            assert "start     continues" in run.output
        assert_same_curve(folder, whole)

    def test_an_elastic_run_goes_on_with_the_nodes_that_are_left(
        self, sections: Sections, tmp_path: Path, whole: Curve
    ) -> None:
        """Two agents of torchrun --nnodes 1:2; one is killed with its rank."""
        folder = tmp_path / "run"
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=elastic --max-restarts=3"
        options = (
            "--rdzv-conf=last_call_timeout=2,join_timeout=120 --nnodes=1:2 --nproc-per-node=1 --local-addr=localhost"
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous.split(), *options.split(), str(TRAIN)]
        long_run = merged(sections, {"schedule": {"max_steps": STEPS}})
        with (
            LiveRun("fsdp", folder, long_run, command=launcher) as first,
            LiveRun("fsdp", folder, long_run, command=launcher, name="second") as second,
        ):
            first.wait_for_step(EVERY_STEPS + 2)
            assert "world size 2" in first.output + second.output
            second.kill()
            assert first.wait(240) == 0
            assert "world size 1" in first.output
        assert_same_curve(folder, whole)


class TestBadSteps:
    def train(
        self, backend: str, processes: int, folder: Path, sections: Sections, samples: str, fault: str
    ) -> tuple[int, str]:
        environment = {"FAULTY_SAMPLES": samples, "FAULT": fault}
        with LiveRun(backend, folder, sections, processes, FAULTY_TRAIN, environment=environment) as run:
            return run.wait(), run.output

    @pytest.mark.parametrize(
        ("backend", "processes", "precision"),
        [("ddp", 1, "fp32"), ("fsdp", 2, "bf16"), ("zero0", 2, "fp32"), ("zero1", 1, "bf16"), ("zero2", 2, "fp32")]
        + [("zero3", 2, "fp32"), ("zero3", 1, "bf16"), ("ddp", 2, "amp_fp16")],
    )
    def test_a_step_that_is_not_finite_is_skipped(
        self, backend: str, processes: int, precision: str, sections: Sections, tmp_path: Path
    ) -> None:
        """Step 3 has samples 8 to 11; 9 is bad, on one rank only."""
        sections = merged(sections, {"run": {"precision": precision}, "schedule": {"max_steps": 5}})
        status, output = self.train(backend, processes, tmp_path / "run", sections, "9", "nan")
        assert status == 0, output
        assert output.count("not finite, the step is skipped") == 1
        assert "step 3: gradient norm" in output and "(samples 8 to 11)" in output
        rows = read_metrics(tmp_path / "run")
        assert [row["skipped_samples"] for row in rows if "skipped_samples" in row] == [[8, 12]]
        by_step = {row["step"]: row for row in rows if "loss" in row}
        assert by_step[3]["grad_norm"] is None
        assert [by_step[step]["skipped_steps"] for step in (2, 3, 5)] == [0, 1, 1]
        assert all(by_step[step]["loss"] is not None for step in (4, 5))
        state, _ = read_state(list_checkpoints(tmp_path / "run")[-1])
        assert (state.step, state.updates) == (5, 4)

    def test_a_skip_is_the_same_on_every_backend(self, sections: Sections, tmp_path: Path) -> None:
        sections = merged(sections, {"schedule": {"max_steps": 6}})
        for backend, processes in (("ddp", 1), ("zero2", 2), ("fsdp", 1), ("zero3", 2)):
            self.train(backend, processes, tmp_path / backend, sections, "9", "inf")
        curves = {backend: read_metrics(tmp_path / backend) for backend in ("ddp", "zero2", "fsdp", "zero3")}
        losses = {
            backend: [row["loss"] for row in rows if "loss" in row and row["step"] != 3]
            for backend, rows in curves.items()
        }
        for backend in losses:
            differences = [abs(a - b) for a, b in zip(losses[backend], losses["ddp"], strict=True)]
            assert max(differences) <= LOSS_TOLERANCE["fp32"], backend

    @pytest.mark.parametrize(("backend", "processes"), [("ddp", 1), ("zero1", 2)])
    def test_too_many_in_a_row_stop_the_run(
        self, backend: str, processes: int, sections: Sections, tmp_path: Path
    ) -> None:
        sections = merged(sections, {"guard": {"max_bad_steps": 3}})
        bad = ",".join(str(sample) for sample in range(16, 100))  # from step 5 on
        status, output = self.train(backend, processes, tmp_path / "run", sections, bad, "nan")
        assert status != 0
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert "step 7" in line and "samples 24 to 27" in line and "3 steps in a row were not finite" in line
        assert "Traceback" not in output or processes > 1  # torchrun shows one of its own
        assert steps_of(tmp_path / "run") == [4]
        assert find_damage(list_checkpoints(tmp_path / "run")[0]) is None

    @pytest.mark.parametrize(("backend", "processes"), [("ddp", 1), ("fsdp", 2), ("zero2", 2)])
    def test_a_spike_goes_back_and_leaves_the_batch_out(
        self, backend: str, processes: int, sections: Sections, tmp_path: Path
    ) -> None:
        guarded = merged(
            sections,
            {
                "schedule": {"max_steps": 18},
                "guard": {"spike_zscore": 12.0, "spike_window": 10},
                "logging": {"tensorboard": True},
            },
        )
        folder = tmp_path / "run"
        status, output = self.train(backend, processes, folder, guarded, "53", "1000")  # step 14: 52 to 55
        assert status == 0, output
        assert "samples 52 to 55 are left out" in output and "step_00000012" in output
        rows = read_metrics(folder)
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19)), "a gap or a duplicate"
        assert [row["left_out_samples"] for row in rows if "left_out_samples" in row] == [[52, 56]]
        state, _ = read_state(list_checkpoints(folder)[-1])
        assert (state.step, state.updates, state.samples) == (18, 18, 19 * 4)
        assert state.guard.skipped_samples == ((52, 56),) and state.guard.rollbacks == 1
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 19))


class TestFolder:
    def test_a_second_run_in_the_folder_is_refused(self, sections: Sections, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        with LiveRun("ddp", folder, merged(sections, {"schedule": {"max_steps": 10_000}})) as run:
            run.wait_for_step(1)
            second = train_run("fsdp", folder, sections)
            reached = run.last_step()
            assert second.returncode == 2
            assert second.stderr.startswith("error: run.out_dir: ") and f"pid {run.process.pid}" in second.stderr
            assert len(second.stderr.splitlines()) == 1
            run.wait_for_step(reached + 2)  # the first is not disturbed

    def test_other_data_under_the_same_path_is_refused(self, sections: Sections, tmp_path: Path) -> None:
        data = make_corpus(tmp_path / "data", documents=30)
        sections = merged(sections, {"data": {"path": str(data)}, "schedule": {"max_steps": 4, "warmup_steps": 1}})
        curve_of("ddp", tmp_path / "run", sections)
        for path in data.iterdir():
            path.unlink()
        make_corpus(data, documents=31)
        result = train_run("ddp", tmp_path / "run", merged(sections, {"schedule": {"max_steps": 8}}))
        assert result.returncode == 2
        assert "was trained on other data" in result.stderr

    def test_a_flipped_bit_in_a_shard_stops_before_the_start(self, sections: Sections, tmp_path: Path) -> None:
        data = make_corpus(tmp_path / "data", documents=30)
        (shard, *_) = sorted(data.glob("*train*.npy"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        result = train_run("ddp", tmp_path / "run", merged(sections, {"data": {"path": str(data)}}), processes=2)
        assert result.returncode != 0
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and shard.name in lines[0] and "SHA-256" in lines[0]


def in_small_tmpfs(folder: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """A shell script with a small disk of its own at ``folder``; root's mounts need a namespace, no real root."""
    mounted = f"mount -t tmpfs -o size={size} tmpfs {folder} && {script}"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted],
        cwd=REPOSITORY,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def can_mount_tmpfs() -> bool:
    probe = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"],
        capture_output=True,
    )
    return probe.returncode == 0


class TestFullDisk:
    """A checkpoint of the tiny model takes 32 MB."""

    def command(self, folder: Path, sections: Sections, after: str = "") -> str:
        arguments = " ".join(f"'{argument}'" for argument in train_arguments("ddp", folder, sections))
        look = f"ls -A {folder}/checkpoints; tail -c 300 {folder}/metrics.jsonl"
        return f"{after} {sys.executable} {TRAIN} {arguments}; echo status $?; {look}"

    @pytest.mark.skipif(not can_mount_tmpfs(), reason="this machine lets nobody mount a tmpfs in a namespace")
    def test_training_goes_on_and_the_end_is_an_error(self, sections: Sections, tmp_path: Path) -> None:
        """Room for one checkpoint; the second, the third and the last cannot be written."""
        result = in_small_tmpfs(tmp_path, "40m", self.command(tmp_path / "run", sections))
        output = result.stdout + result.stderr
        assert "No space left on device" in output and "failed saves in this run: 1" in output
        assert "failed saves in this run: 2" in output
        assert f"step {STEPS}/{STEPS} | loss" in output, "training went on to its last step"
        assert "error: cannot save" in output and "status 2" in output
        assert "\nstep_00000004\n" in output and ".partial" not in output.split("status 2")[1]
        assert "Traceback" not in output

    @pytest.mark.skipif(not can_mount_tmpfs(), reason="this machine lets nobody mount a tmpfs in a namespace")
    def test_room_again_is_no_error(self, sections: Sections, tmp_path: Path) -> None:
        """A file of someone else fills the disk while the first saves are due, and goes."""
        folder = tmp_path / "run"
        filler = f"{tmp_path}/filler"
        freed = (
            f"dd if=/dev/zero of={filler} bs=1M count=85 2>/dev/null; "
            f"(until grep -qs '\"step\": 6,' {folder}/metrics.jsonl; do sleep 0.05; done; rm {filler}) &"
        )
        result = in_small_tmpfs(tmp_path, "110m", self.command(folder, sections, freed))
        output = result.stdout + result.stderr
        assert "failed saves in this run: 1" in output and "status 0" in output, output
        assert "step_00000014" in output and "Traceback" not in output

    @pytest.mark.skipif(not can_mount_tmpfs(), reason="this machine lets nobody mount a tmpfs in a namespace")
    def test_a_disk_that_becomes_read_only(self, sections: Sections, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        turned = (
            f"(until grep -qs '\"step\": 5,' {folder}/metrics.jsonl; do sleep 0.05; done; "
            f"mount -o remount,ro {tmp_path} || mount -o remount,ro,force {tmp_path}) &"
        )
        result = in_small_tmpfs(tmp_path, "200m", self.command(folder, sections, turned))
        output = result.stdout + result.stderr
        assert f"step {STEPS}/{STEPS} | loss" in output, output
        assert "status 0" in output or "Read-only file system" in output


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_run_killed_at_random_comes_to_the_same_end(
    seed: int, corpus: Path, tmp_path: Path, uninterrupted: Callable[[], Curve]
) -> None:
    """A short, seeded part of ``make chaos``."""
    outcome: Outcome = survive(0, seed, corpus, tmp_path, uninterrupted())
    assert outcome.problems == [], outcome


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Curve]:
    curves: list[Curve] = []

    def curve() -> Curve:
        if not curves:
            curves.append(curve_of("ddp", tmp_path_factory.mktemp("uninterrupted"), chaos_sections(corpus)))
        return curves[0]

    return curve


def test_the_exit_statuses_are_documented() -> None:
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for status in (0, 2, 3, 130, 138, 143):
        assert f"| {status} |" in text
