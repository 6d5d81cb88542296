"""Upload the checkpoints of a run to a URL while training continues.

Each rank has a thread that uploads. The threads use no collectives, so a rank with a slow network does not block the
others. One *round* of ``UploadRounds`` uploads the tensor files of one checkpoint. When all ranks have succeeded,
rank 0 uploads the state and writes the manifest at the URL.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError, describe_error, one_line
from pipeline.checkpoint.layout import MANIFEST_FILE, STATE_FILE, checkpoint_folder, list_checkpoints, step_of
from pipeline.checkpoint.manifest import CheckpointManifest, Files, read_manifest
from pipeline.checkpoint.pairing import forget_abandoned, is_abandoned, is_paired, pair
from pipeline.checkpoint.remote_run import ABANDONED_MANIFEST, RemoteRun
from pipeline.checkpoint.retention import best_step, is_state_of_milestone, surplus_steps
from pipeline.checkpoint.upload_rounds import UploadRounds
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import METRICS_FILE

log = logging.getLogger(__name__)

#: The pause between two requests of a rank that waits for a round. It grows until the next save or round.
_SHORTEST_PAUSE_S, _LAST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_GROWTH = 0.5, 1.0, 10.0, 1.25
_FILE_POLL_S = 0.1
_VISIBLE_S = 10.0  # a network file system may show a new file late on other hosts


@dataclass(frozen=True)
class UploadOutcome:
    """The result of uploading one checkpoint, or a failure of another action, such as the deletion of old files.

    Such a failure has the step of the newest checkpoint.
    """

    step: int
    seconds: float
    bytes: int  # of all ranks; 0 after a failure
    problem: str | None  # the reason in one line if the action failed
    action: str  # for a message: a verb, its object and a preposition, before the URL


class Mirror:
    """Uploads a run's checkpoints to a URL, and deletes old checkpoints there by the same rules as in the run folder.

    Call ``request`` after each save. The ranks then upload the checkpoints that the URL lacks, the newest first. A
    failed upload is tried again after later saves, as long as the checkpoint is on the disk.

    Args:
        timeout_s: the longest time for one upload, and for the wait at the end of the run.
    """

    def __init__(self, url: str, run_folder: Path, world: World, *, keep_last: int, timeout_s: float) -> None:
        self.url = url
        self.run_folder = run_folder
        self.keep_last = keep_last
        self.timeout_s = timeout_s
        self._rank = world.rank
        self._rounds = UploadRounds(world, timeout_s)
        self._remote: RemoteRun | None = None
        self._is_paired = False
        self._milestones: dict[int, bool] = {}
        self._known: dict[int, bytes] = {}  # manifests of the checkpoints at the URL and on the disk
        self._uploading: set[int] = set()
        self._lock = threading.Lock()  # held while checkpoints on the disk are deleted or chosen for an upload
        self._outcomes: deque[UploadOutcome] = deque()
        self._action = "upload to"  # what rank 0 does at present, see UploadOutcome.action
        self._last_problem = "the upload did not begin"
        self._newest = 0  # the newest step on the disk when rank 0 last looked
        self._due, self._ending = threading.Event(), threading.Event()
        run = self._lead if world.is_main else self._follow
        self._thread = threading.Thread(target=run, name="mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request(self) -> None:
        """Begin to upload the checkpoints that the URL lacks. Return at once."""
        self._due.set()

    def poll(self) -> list[UploadOutcome]:
        """Return the outcomes of the uploads that ended since the last call. Ranks other than 0 get an empty list."""
        outcomes = []
        while self._outcomes:
            outcomes.append(self._outcomes.popleft())
        return outcomes

    @contextmanager
    def pinned(self) -> Iterator[Set[int]]:
        """Return a context manager for the deletion of local checkpoints. No upload begins inside its block.

        The block gets the steps whose checkpoints are being uploaded, and must not delete these checkpoints.
        """
        with self._lock:
            yield frozenset(self._uploading)

    def finish(self, wait: Callable[[], None]) -> list[UploadOutcome]:
        """Wait at most ``timeout_s`` seconds until the newest checkpoint is uploaded.

        Every rank must call this method at the end of a run. Returns the outcomes of uploads that ``poll`` has not
        returned yet.

        Args:
            wait: called about twice per second during the wait, for example to record progress.
        """
        self._ending.set()
        self._due.set()
        deadline = time.monotonic() + self.timeout_s
        is_announced = False
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_SHORTEST_PAUSE_S)
            wait()
            if not is_announced and self._uploading:
                log.info("waiting for the upload to %s, at most %.0f s", self.url, self.timeout_s)
                is_announced = True
        if self._rank == 0 and self._thread.is_alive():
            problem = f"it took longer than checkpoint.remote_timeout_s {self.timeout_s:g}"
            self._fail(self._newest, self.timeout_s, problem)
            self._rounds.end()
        return self.poll()

    def why_missing(self) -> str | None:
        """Return why the newest checkpoint is not at the URL. Return None if it is there, or if there is none.

        Call this method on rank 0, after ``finish``.
        """
        newest = self._newest_step()
        is_there = newest == 0 or self._known.get(newest) == self._own_manifest(newest)
        return None if is_there else self._last_problem

    def _own_manifest(self, step: int) -> bytes:
        return (checkpoint_folder(self.run_folder, step) / MANIFEST_FILE).read_bytes()

    def _fail(self, step: int, seconds: float, problem: str) -> None:
        self._last_problem = problem
        self._outcomes.append(UploadOutcome(step, seconds, 0, problem, self._action))

    def _newest_step(self) -> int:
        return max(map(step_of, list_checkpoints(self.run_folder)), default=0)

    # Methods of rank 0

    def _lead(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            self._synchronize()
            if self._ending.is_set() and not self._due.is_set():
                self._rounds.end()
                return

    def _synchronize(self) -> None:
        """Upload the missing checkpoints and delete old ones at the URL. An error becomes a failed outcome."""
        started, failed = time.monotonic(), False
        try:
            self._action = "compare the run folder with"
            self._newest = self._newest_step()
            found = self._open().list()
            self._pair(found)
            self._action = "set later checkpoints aside at"
            self._set_later_aside(found, self._newest)
            self._action = "compare the run folder with"
            for step in self._choose(found):
                uploaded = self._try_upload(step, found)
                found, failed = uploaded or found, failed or uploaded is None
                with self._lock:
                    self._uploading.discard(step)
                if self._due.is_set():  # there may be a newer checkpoint
                    break
            self._action = f"upload {METRICS_FILE} to"
            self._upload_metrics()
            self._action = "delete old files at"
            self._delete_older(found)
        except Exception as error:  # noqa: BLE001 - reported; the thread must live until the end of the run
            if not failed:  # otherwise, the reason is probably the same
                self._fail(self._newest, time.monotonic() - started, _reason(error))
        finally:
            with self._lock:
                self._uploading.clear()

    def _try_upload(self, step: int, found: dict[int, dict[str, int]]) -> dict[int, dict[str, int]] | None:
        """Upload a checkpoint and record the outcome. Returns the files at the URL, or None after a failure."""
        started = time.monotonic()
        self._action = f"upload step {step} to"
        try:
            size, listed = self._upload(step, found)
        except Exception as error:  # noqa: BLE001 - reported; the other checkpoints must not wait for this one
            self._fail(step, time.monotonic() - started, _reason(error))
            return None
        self._outcomes.append(UploadOutcome(step, time.monotonic() - started, size, None, self._action))
        return listed

    def _pair(self, found: Mapping[int, Mapping[str, int]]) -> None:
        """Record that the URL belongs to this run. Raises CheckpointError if another run has checkpoints there."""
        if self._is_paired:
            return
        complete = [step for step, files in found.items() if MANIFEST_FILE in files]
        if complete and not is_paired(self.run_folder, self.url):
            raise CheckpointError(
                f"{self.url} already holds checkpoints of another run (steps {', '.join(map(str, sorted(complete)))}); "
                "nothing is uploaded; set checkpoint.remote to another URL"
            )
        pair(self.run_folder, self.url)
        self._is_paired = True

    def _set_later_aside(self, found: dict[int, dict[str, int]], newest: int) -> None:
        """Set aside the checkpoints of later steps, because the run has continued from an earlier checkpoint."""
        run = self._open()
        for step, files in found.items():
            if MANIFEST_FILE in files and (step > newest or is_abandoned(self.run_folder, run.url, step)):
                run.set_aside(step)
                del files[MANIFEST_FILE]
                log.warning("set aside %s: the run continues from an earlier step", run.checkpoint_url(step))
        forget_abandoned(self.run_folder, run.url)

    def _choose(self, found: dict[int, dict[str, int]]) -> list[int]:
        """Return the steps that the URL lacks, newest first, and protect their checkpoints from deletion."""
        with self._lock:
            steps = [step_of(folder) for folder in list_checkpoints(self.run_folder)]
            missing = [step for step in reversed(steps) if not self._has(step, found.get(step, {}))]
            self._uploading.update(missing)
        return missing

    def _has(self, step: int, sizes: Mapping[str, int]) -> bool:
        """Return whether the URL has the same checkpoint as the disk. Compares manifests and file sizes."""
        if MANIFEST_FILE not in sizes:
            return False
        with suppress(CheckpointError, OSError):
            own = self._own_manifest(step)
            if self._known.get(step) == own:
                return True
            self._known.pop(step, None)  # the run went back, and has saved this step again
            there = self._open().open(step, sizes)
            if own == there.manifest_bytes and there.find_size_damage() is None:
                self._known[step] = own
        return step in self._known

    def _upload(self, step: int, found: dict[int, dict[str, int]]) -> tuple[int, dict[int, dict[str, int]]]:
        """Run one round. Returns the number of bytes that all ranks uploaded, and the files at the URL."""
        folder = checkpoint_folder(self.run_folder, step)
        manifest_bytes = self._own_manifest(step)
        files = read_manifest(folder).files
        if MANIFEST_FILE in found.get(step, {}):  # a checkpoint of the same step before the run went back
            self._open().set_aside(step)
            del found[step][MANIFEST_FILE]
        problem = self._upload_share(step, self._rounds.begin(step, files))
        if problems := [text for text in [problem, *self._rounds.collect()] if text]:
            raise CheckpointError("; ".join(problems))
        self._open().upload(step, folder / STATE_FILE, files[STATE_FILE])
        listed = self._open().publish(step, manifest_bytes, files)
        self._known[step] = manifest_bytes
        return sum(entry.bytes for entry in files.values()) + len(manifest_bytes), listed

    def _delete_older(self, found: Mapping[int, Mapping[str, int]]) -> None:
        """Delete checkpoints at the URL by the rules of ``delete_older``, and the files of interrupted uploads.

        In these rules, ``verified`` is the newest checkpoint that is both on the disk and at the URL.
        """
        remote = self._open()
        complete = {step for step, files in found.items() if MANIFEST_FILE in files}
        with self._lock:
            uploaded = complete & self._known.keys()
            both = [folder for folder in list_checkpoints(self.run_folder) if step_of(folder) in uploaded]
            if not both:
                return
            newest, best = step_of(both[-1]), best_step(both[-1])

        def find_manifest(step: int) -> CheckpointManifest:
            known = self._known.get(step)
            return remote.parse_manifest(step, known) if known else remote.open(step, found[step]).manifest

        for step in surplus_steps(complete, newest, self.keep_last, best, find_manifest):
            if step not in self._milestones:
                self._milestones[step] = is_state_of_milestone(remote.read_state(step))
            if not self._milestones[step]:
                remote.delete(step, found[step])
        for step, files in found.items():
            if step < newest and step not in complete and ABANDONED_MANIFEST not in files:
                remote.delete(step, files)

    def _upload_metrics(self) -> None:
        with suppress(FileNotFoundError):
            if list_checkpoints(self.run_folder):
                self._open().write_metrics((self.run_folder / METRICS_FILE).read_bytes())

    # Methods of every rank

    def _open(self) -> RemoteRun:
        self._remote = self._remote or RemoteRun(self.url)
        return self._remote

    def _follow(self) -> None:
        """Upload this rank's files in each round, until rank 0 ends the rounds. A late rank skips rounds."""
        pause_s = _SHORTEST_PAUSE_S
        with suppress(RuntimeError):  # the process with the store has ended
            while not self._rounds.have_ended:
                if share := self._rounds.next_share():
                    self._rounds.report(share, self._upload_share(share.step, share.files))
                    pause_s = _SHORTEST_PAUSE_S
                elif self._due.wait(pause_s):  # this rank has saved a checkpoint, so a round begins soon
                    self._due.clear()
                    pause_s = _SHORTEST_PAUSE_S
                else:  # when the run ends, rank 0 may end together with the store
                    longest_s = _LAST_PAUSE_S if self._ending.is_set() else _LONGEST_PAUSE_S
                    pause_s = min(_PAUSE_GROWTH * pause_s, longest_s)

    def _upload_share(self, step: int, files: Files) -> str:
        """Upload this rank's tensor files. Returns the problem in one line, or ""."""
        folder = checkpoint_folder(self.run_folder, step)
        try:
            for name, entry in files.items():
                _wait_for_file(folder / name)
                self._open().upload(step, folder / name, entry)
        except Exception as error:  # noqa: BLE001 - rank 0 waits for the result
            return f"rank {self._rank}: {_reason(error)}"
        return ""


def _wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_FILE_POLL_S)


def _reason(error: Exception) -> str:
    return one_line(error) if isinstance(error, UserError | OSError) else describe_error(error)
