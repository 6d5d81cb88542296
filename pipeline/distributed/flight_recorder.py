"""Save and summarize torch's flight recorder, which remembers the newest collectives of this rank.

``TORCH_FR_BUFFER_SIZE`` sets how many collectives the recorder remembers. The default is 2000. With 0, the recorder
is off.
"""

import pickle
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from pipeline.distributed.error_messages import print_error, prints_for_node

_DUMP_TIMEOUT_S = 10.0  # the recorder asks the driver of a GPU, which may hang


def report_collectives(folder: Path | None, rank: int) -> None:
    """Save the flight recorder of this rank, and print one line about it on standard error.

    With many ranks, only some ranks print the line.

    Args:
        folder: a folder in the run folder. If it is None or if the run folder does not exist, do nothing.
    """
    if folder and folder.parent.is_dir():
        summary = save_flight_recorder(folder, rank)
        if prints_for_node():
            print_error(f"[rank {rank}] {summary}")


def save_flight_recorder(folder: Path, rank: int) -> str:
    """Write the flight recorder to the file ``rank_N`` in a folder, and return a summary of one line.

    torch's command ``torchfrtrace`` reads the files of all ranks.
    """
    summary = [f"the flight recorder of torch did not answer in {_DUMP_TIMEOUT_S:.0f} s"]

    def save() -> None:
        dump = _dump()
        path = folder / f"rank_{rank}"
        place = str(path)
        try:
            folder.mkdir(exist_ok=True)
            path.write_bytes(dump)
        except OSError as error:
            place += f": {error.strerror}"
        summary[0] = f"{summarize(pickle.loads(dump), time.time_ns())} ({place})"

    thread = threading.Thread(target=save, name="flight-recorder", daemon=True)
    thread.start()
    thread.join(_DUMP_TIMEOUT_S)
    return summary[0]


def _dump() -> bytes:
    """Return the recorded collectives of torch's default backend (NCCL or Gloo) as a pickle.

    The dump has no call stacks. To add them, torch would import many modules, and the file system may hang.
    """
    is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    dump = getattr(_distributed_c10d, "_dump_nccl_trace" if is_nccl else "_dump_fr_trace")
    return bytes(dump(includeCollectives=True, includeStackTraces=False, onlyActive=False))


def summarize(record: Mapping[str, Any], now_ns: int) -> str:
    """Describe the oldest unfinished collective in a flight record. If all are finished, describe the newest one.

    Args:
        record: torch's dump of the flight recorder in format version 2.
        now_ns: the current time, in nanoseconds since the epoch.
    """
    entries = record.get("entries", [])
    if not entries:
        return "the flight recorder of torch has no collectives (TORCH_FR_BUFFER_SIZE=0 turns it off)"
    waiting = [entry for entry in entries if not entry["retired"]]
    if not waiting:
        return f"waits in no collective; the newest is {_describe(entries[-1], now_ns)}"
    more = f", and {len(waiting) - 1} later" if len(waiting) > 1 else ""
    return f"waits in {_describe(waiting[0], now_ns)}{more}"


def _describe(entry: Mapping[str, Any], now_ns: int) -> str:
    sizes = " ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"][:2])
    more = f" and {len(entry['input_sizes']) - 2} more" if len(entry["input_sizes"]) > 2 else ""
    group = entry["process_group"][1] or entry["process_group"][0]
    return (
        f"{entry['profiling_name']} {entry['collective_seq_id']} of {group} with {sizes}{more}, "
        f"{(now_ns - entry['time_created_ns']) / 1e9:.0f} s ago"
    )
