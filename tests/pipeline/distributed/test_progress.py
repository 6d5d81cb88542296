"""The main thread records which marks it has passed, and the longest CPU time between two marks of a repeated phase."""

from __future__ import annotations

import pytest

from pipeline.distributed.progress import Progress
from tests.pipeline.distributed.conftest import use_cpu


def test_phases_and_collectives_are_marks_and_moves_are_not() -> None:
    progress = Progress()
    calls: list[int] = []
    progress.listener = lambda: calls.append(progress.position)
    progress.reach("step 1")
    progress.pass_mark()
    progress.move()
    assert (progress.phase, progress.position, progress.moves) == ("step 1", 2, 1)
    assert len(calls) == 3


def test_the_start_is_patient_and_the_next_phase_is_not() -> None:
    progress = Progress()
    assert progress.is_patient and not progress.repeats
    progress.reach("step 1")
    assert not progress.is_patient and progress.repeats


def test_patience_ends_with_its_block_also_after_an_error() -> None:
    progress = Progress()
    progress.reach("step 1")
    with pytest.raises(KeyError), progress.patience():
        assert progress.is_patient and not progress.repeats
        raise KeyError
    assert not progress.is_patient and progress.repeats
    assert (progress.position, progress.moves) == (1, 2)


def test_only_the_cpu_time_of_phases_that_repeat_counts() -> None:
    progress = Progress()
    use_cpu(0.2)
    progress.reach("save", repeats=False)
    use_cpu(0.2)
    progress.reach("step 1")
    assert progress.longest_s == 0.0, "the start and the save do not repeat"
    use_cpu(0.05)
    progress.pass_mark()
    assert 0.05 <= progress.longest_s < 0.2
    use_cpu(0.2)
    progress.excused_s = 0.2
    progress.move()
    assert progress.longest_s < 0.2, "compiling is excused"
