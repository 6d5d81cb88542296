"""Which steps are skipped or spike, and when the run stops."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from pipeline.checkpoint.state import GuardState
from pipeline.config.schema import GuardConfig
from pipeline.errors import TrainingError
from pipeline.hardware.device import LateValue
from pipeline.training.step_guard import StepGuard, StepVerdict, TrainedStep, z_score

WINDOW = 10


def guard(state: GuardState | None = None, **options: Any) -> StepGuard:
    return StepGuard(GuardConfig.model_validate(options), state or GuardState())


def spike_guard(**options: Any) -> StepGuard:
    return guard(**{"spike_zscore": 4.0, "spike_window": WINDOW, **options})


def finished(step: int = 1, *, norm: float = 1.0, loss: float = 3.0, loss_scale: float = 1.0) -> TrainedStep:
    late_norm = LateValue(torch.tensor(norm, dtype=torch.float64))
    return TrainedStep(step, 4 * step - 4, 4 * step, LateValue(loss), late_norm, loss_scale, 1e-3, LateValue(48))


def judge_all(judge: StepGuard, norms: Iterable[float], **more: Any) -> list[StepVerdict]:
    return [judge.judge(finished(step, norm=norm, **more)) for step, norm in enumerate(norms, start=1)]


def fill_window(judge: StepGuard, steps: int = WINDOW) -> None:
    """Judge losses around 3 with a deviation of 0.1, and norms around 1 with a deviation of 0.01."""
    for step in range(1, steps + 1):
        sign = 1 if step % 2 else -1
        verdict = judge.judge(finished(step, loss=3.0 + sign * 0.1, norm=1.0 + sign * 0.01))
        assert verdict is StepVerdict.GOOD


class TestSkips:
    @pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
    def test_a_step_that_is_not_finite_is_skipped(self, norm: float, caplog: pytest.LogCaptureFixture) -> None:
        judge = guard()
        with caplog.at_level(logging.WARNING):
            assert judge.judge(finished(7, norm=norm)) is StepVerdict.SKIPPED
        assert judge.state.bad_in_a_row == 1
        assert f"step 7: gradient norm {norm} (samples 24 to 27)" in caplog.text

    def test_a_finite_step_is_good_and_does_not_change_the_state(self) -> None:
        judge = guard()
        assert judge_all(judge, [1.0, 1e30, 0.0]) == [StepVerdict.GOOD] * 3
        assert judge.state == GuardState()

    def test_too_many_in_a_row_stop_the_run(self) -> None:
        judge = spike_guard(max_bad_steps=3)
        judge_all(judge, [math.nan] * 2)
        with pytest.raises(TrainingError) as caught:
            judge.judge(finished(3, norm=math.nan, loss=math.nan))
        line = str(caught.value)
        assert line.startswith("step 3: loss nan, gradient norm nan (samples 8 to 11): 3 steps in a row")
        assert "learning_rate" in line and "guard.max_bad_steps" in line and "\n" not in line

    def test_a_limit_of_one(self) -> None:
        with pytest.raises(TrainingError, match=r"step 1: .*1 steps in a row"):
            guard(max_bad_steps=1).judge(finished(norm=math.inf))

    def test_a_finite_step_resets_the_count(self) -> None:
        judge = guard(max_bad_steps=3)
        verdicts = judge_all(judge, [math.nan, math.nan, 1.0] * 5)
        assert verdicts == [StepVerdict.SKIPPED, StepVerdict.SKIPPED, StepVerdict.GOOD] * 5
        assert judge.state.bad_in_a_row == 0

    def test_the_count_continues_after_a_restart(self) -> None:
        judge = guard(GuardState(bad_in_a_row=2), max_bad_steps=3)
        with pytest.raises(TrainingError, match="3 steps in a row"):
            judge.judge(finished(norm=math.nan))

    def test_overflows_of_a_high_loss_scale_do_not_count(self) -> None:
        """fp16 starts with a high loss scale and halves it after each overflow."""
        judge = guard(max_bad_steps=2)
        for step in range(1, 17):
            assert judge.judge(finished(step, norm=math.inf, loss_scale=2.0 ** (17 - step))) is StepVerdict.SKIPPED
        assert judge.state.bad_in_a_row == 0
        judge.judge(finished(17, norm=math.inf, loss_scale=1.0))
        with pytest.raises(TrainingError, match="2 steps in a row"):
            judge.judge(finished(18, norm=math.inf, loss_scale=0.5))

    def test_a_skip_at_a_high_loss_scale_does_not_reset_the_count(self) -> None:
        judge = guard(max_bad_steps=3)
        judge.judge(finished(1, norm=math.nan))
        judge.judge(finished(2, norm=math.nan, loss_scale=2.0))
        assert judge.state.bad_in_a_row == 1

    def test_skipped_steps_are_not_in_the_window(self) -> None:
        judge = spike_guard(max_bad_steps=100)
        judge_all(judge, [math.nan] * 20)
        assert judge.state.recent == ()


class TestSpikes:
    def test_without_a_threshold_no_step_is_a_spike(self) -> None:
        judge = guard()
        assert judge.config.spike_zscore is None
        assert judge_all(judge, [1.0] * 200 + [1e9])[-1] is StepVerdict.GOOD

    @pytest.mark.parametrize("spike", [{"loss": 3.5}, {"norm": 1.05}], ids=["loss", "norm"])
    def test_a_loss_or_norm_far_above_the_last_ones_is_a_spike(
        self, spike: dict[str, float], caplog: pytest.LogCaptureFixture
    ) -> None:
        judge = spike_guard()
        fill_window(judge)
        before = judge.state
        with caplog.at_level(logging.WARNING):
            assert judge.judge(finished(11, **spike)) is StepVerdict.SPIKE
        what = "loss" if "loss" in spike else "gradient norm"
        assert f"step 11: loss {spike.get('loss', 3.0):.4g}" in caplog.text
        assert f"its {what} is 5.0 standard deviations above the last 10 steps" in caplog.text
        assert judge.state == before, "a spike does not enter the window"

    @pytest.mark.parametrize("usual", [{"loss": 3.39}, {"norm": 1.039}, {"loss": 0.1}, {"norm": 0.0}])
    def test_below_the_threshold_no_step_is_a_spike(self, usual: dict[str, float]) -> None:
        """A fall is never a spike."""
        judge = spike_guard()
        fill_window(judge)
        assert judge.judge(finished(11, **usual)) is StepVerdict.GOOD

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_is_a_spike(self, loss: float) -> None:
        judge = spike_guard()
        fill_window(judge)
        assert judge.judge(finished(11, loss=loss)) is StepVerdict.SPIKE

    def test_no_step_is_a_spike_before_the_window_is_full(self) -> None:
        judge = spike_guard()
        fill_window(judge, WINDOW - 1)
        assert judge.judge(finished(10, loss=1e6, norm=1e6)) is StepVerdict.GOOD

    def test_the_window_moves(self) -> None:
        judge = spike_guard()
        fill_window(judge)
        for step in range(11, 21):
            judge.judge(finished(step, loss=2.0 + 0.01 * (step % 2), norm=1.0))
        assert len(judge.state.recent) == WINDOW
        assert judge.judge(finished(21, loss=2.9)) is StepVerdict.SPIKE, "the losses of 3 have left the window"

    @pytest.mark.parametrize("value", [3.0, 1e-30, 1e6, 0.0])
    def test_rounding_in_a_flat_window_is_no_spike(self, value: float) -> None:
        judge = spike_guard()
        judge_all(judge, [value] * WINDOW, loss=value)
        assert judge.judge(finished(11, loss=math.nextafter(value, -1), norm=value * (1 + 1e-7))) is StepVerdict.GOOD
        if value:
            assert judge.judge(finished(12, loss=value * 1.01, norm=value)) is StepVerdict.SPIKE

    def test_in_a_window_of_zeros_any_increase_is_a_spike(self) -> None:
        judge = spike_guard()
        judge_all(judge, [1.0] * WINDOW, loss=0.0)
        assert judge.judge(finished(11, loss=1e-9)) is StepVerdict.SPIKE

    def test_z_scores_computed_by_hand(self) -> None:
        assert z_score(10.0, (2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0)) == pytest.approx(2.5)
        assert z_score(0.0, (-1.0, 1.0)) == 0.0
        assert math.isnan(z_score(math.nan, (1.0, 2.0)))


class TestRollbacks:
    def test_too_many_rollbacks_stop_the_run(self) -> None:
        judge = spike_guard(max_rollbacks=2)
        fill_window(judge)
        stored = judge.state
        for step in (11, 12):
            spike = finished(step, loss=9.0)
            assert judge.judge(spike) is StepVerdict.SPIKE
            judge.after_rollback(stored, spike)
        assert judge.state.rollbacks == 2
        with pytest.raises(TrainingError) as caught:
            judge.judge(finished(13, loss=9.0))
        line = str(caught.value)
        assert line.startswith("step 13: loss 9,") and "after 2 rollbacks" in line and "\n" not in line
        assert "guard.max_rollbacks" in line and "samples 48 to 51" in line

    def test_a_limit_of_zero(self) -> None:
        judge = spike_guard(max_rollbacks=0)
        fill_window(judge)
        with pytest.raises(TrainingError, match="after 0 rollbacks"):
            judge.judge(finished(11, loss=9.0))

    def test_a_rollback_restores_the_window_and_keeps_the_skipped_samples(self) -> None:
        judge = spike_guard()
        fill_window(judge)
        stored = GuardState(bad_in_a_row=1, recent=judge.state.recent[:4])
        judge.after_rollback(stored, finished(11))
        judge.after_rollback(stored, finished(15))
        assert judge.state == GuardState(1, 2, ((40, 44), (56, 60)), stored.recent)


class TestLeftOutSamples:
    @staticmethod
    def steps_from(judge: StepGuard, consumed: int, samples_per_step: int, steps: int) -> list[int]:
        starts = []
        for _ in range(steps):
            first = judge.next_sample(consumed, samples_per_step)
            starts.append(first)
            consumed = first + samples_per_step
        return starts

    @pytest.mark.parametrize(
        ("left_out", "starts"),
        [
            ((), [0, 4, 8, 12, 16]),
            (((8, 12),), [0, 4, 12, 16, 20]),
            (((8, 12), (12, 16)), [0, 4, 16, 20, 24]),
            (((12, 16), (8, 12)), [0, 4, 16, 20, 24]),
            (((8, 12), (16, 20)), [0, 4, 12, 20, 24]),
            (((0, 4),), [4, 8, 12, 16, 20]),
            (((10, 14),), [0, 4, 14, 18, 22]),
            (((10, 14), (15, 16)), [0, 4, 16, 20, 24]),
            (((9, 10),), [0, 4, 10, 14, 18]),
            (((5, 17),), [0, 17, 21, 25, 29]),
            (((8, 12), (8, 12)), [0, 4, 12, 16, 20]),
            (((5, 17), (8, 9)), [0, 17, 21, 25, 29]),
            (((100, 104),), [0, 4, 8, 12, 16]),
        ],
    )
    def test_no_step_touches_them(self, left_out: tuple[tuple[int, int], ...], starts: list[int]) -> None:
        """Ranges need not begin where steps do, because the batch size may have changed."""
        judge = guard(GuardState(skipped_samples=left_out))
        assert self.steps_from(judge, 0, 4, 5) == starts
        used = {sample for start in starts for sample in range(start, start + 4)}
        assert not used & {sample for first, stop in left_out for sample in range(first, stop)}

    def test_a_run_does_not_repeat_the_batch_after_a_rollback(self) -> None:
        judge = spike_guard()
        judge.after_rollback(GuardState(), finished(3))
        assert self.steps_from(judge, 4, 4, 3) == [4, 12, 16]


class TestQueue:
    def test_steps_are_judged_in_order_and_the_newest_may_wait(self) -> None:
        judge = guard()
        for step, norm in ((1, 1.0), (2, math.nan), (3, 2.0)):
            judge.enqueue(finished(step, norm=norm))
        judged = [(trained.step, verdict) for trained, verdict in judge.judge_queued(leave=1)]
        assert judged == [(1, StepVerdict.GOOD), (2, StepVerdict.SKIPPED)]
        assert [trained.step for trained, _ in judge.judge_queued()] == [3]
        assert list(judge.judge_queued()) == []

    def test_no_step_after_a_spike_is_judged_if_the_run_is_rolled_back(self) -> None:
        judge = spike_guard()
        fill_window(judge)
        judge.enqueue(finished(11, loss=9.0))
        judge.enqueue(finished(12, norm=math.nan))
        spike, verdict = next(judge.judge_queued())
        assert (spike.step, verdict) == (11, StepVerdict.SPIKE)
        judge.after_rollback(GuardState(), spike)
        assert list(judge.judge_queued()) == []
        assert judge.state.bad_in_a_row == 0


class TestState:
    STATES = [
        GuardState(),
        GuardState(3, 2, ((40, 44), (8, 12)), ((3.25, 1.0), (1 / 3, 2.5e-308), (0.0, 1e300))),
    ]

    @pytest.mark.parametrize("state", STATES, ids=["new", "used"])
    def test_it_is_unchanged_by_json(self, state: GuardState) -> None:
        text = json.dumps(asdict(state), allow_nan=False)
        assert TypeAdapter(GuardState).validate_json(text, strict=True) == state

    def test_a_restored_guard_reaches_the_same_verdicts(self) -> None:
        whole = spike_guard(max_bad_steps=100)
        norms = [1.0 + 0.01 * (step % 3) for step in range(25)] + [math.nan, 1.01, 1.5]
        verdicts = judge_all(whole, norms)
        assert verdicts[-3:] == [StepVerdict.SKIPPED, StepVerdict.GOOD, StepVerdict.SPIKE]
        for stopped_at in (5, 15, 26):
            first = spike_guard(max_bad_steps=100)
            judge_all(first, norms[:stopped_at])
            text = json.dumps(asdict(first.state))
            state = TypeAdapter(GuardState).validate_json(text, strict=True)
            second = spike_guard(state=state, max_bad_steps=100)
            assert judge_all(second, norms[stopped_at:]) == verdicts[stopped_at:]
            assert second.state == whole.state
