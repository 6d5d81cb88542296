"""Another thread sees for how long the main thread has been still, and how much it has computed since its last mark."""

from __future__ import annotations

import threading

from pipeline.distributed.main_thread import MainThread, Place
from pipeline.distributed.progress import Progress
from tests.pipeline.distributed.conftest import use_cpu


def observe(progress: Progress, main_thread: MainThread) -> Place:
    """Observe from another thread, as the heartbeat does, as if a second had passed."""
    places: list[Place] = []
    observer = threading.Thread(target=lambda: places.append(main_thread.observe(1.0)))
    observer.start()
    observer.join()
    return places[0]


def test_a_thread_is_still_until_it_passes_a_mark_or_uses_the_cpu() -> None:
    progress = Progress()
    progress.reach("step 1")
    main_thread = MainThread(progress, is_patient=False)
    assert [observe(progress, main_thread).idle_s for _ in range(3)] == [1.0, 2.0, 3.0]
    progress.move()
    place = observe(progress, main_thread)
    assert (place.idle_s, place.longest_wait_s) == (0.0, 3.0)
    use_cpu(0.05)
    assert observe(progress, main_thread).idle_s == 0.0
    place = observe(progress, main_thread)
    assert (place.idle_s, place.position, place.phase) == (1.0, 1, "step 1")
    assert place.line.endswith(" in join") or "threading.py" in place.line
    progress.reach("save", repeats=False)
    assert [observe(progress, main_thread).idle_s for _ in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    progress.pass_mark()
    place = observe(progress, main_thread)
    assert (place.idle_s, place.longest_wait_s) == (0.0, 3.0), "a save does not repeat"


def test_cpu_time_is_counted_between_marks_and_compared_with_the_work_that_repeats() -> None:
    progress = Progress()
    main_thread = MainThread(progress, is_patient=False)
    use_cpu(0.3)
    place = observe(progress, main_thread)
    assert (place.busy_s, place.longest_s) == (0.0, 0.0), "the start is patient"
    progress.reach("step 1")
    use_cpu(0.1)
    progress.pass_mark()
    use_cpu(0.05)
    progress.reach("save", is_patient=True, repeats=False)
    use_cpu(0.3)
    progress.reach("step 2")
    with progress.patience():
        use_cpu(0.3)
        assert observe(progress, main_thread).busy_s == 0.0
    use_cpu(0.2)
    place = observe(progress, main_thread)
    assert 0.2 <= place.busy_s < 0.3 and 0.1 <= place.longest_s < 0.2
    progress.move()
    assert observe(progress, main_thread).busy_s < 0.1


def test_compiling_is_patient_and_does_not_count_as_work() -> None:
    progress = Progress()
    main_thread = MainThread(progress, is_patient=False)
    compiler = {"__name__": "torch._dynamo.convert_frame"}
    exec("def compile(call): return call()", compiler)
    progress.reach("step 1")
    observe(progress, main_thread)
    use_cpu(0.2)
    place = compiler["compile"](lambda: observe(progress, main_thread))
    assert place.is_patient and place.busy_s == 0.0
    place = observe(progress, main_thread)
    assert not place.is_patient and place.busy_s < 0.1
    progress.pass_mark()
    assert progress.longest_s < 0.1
