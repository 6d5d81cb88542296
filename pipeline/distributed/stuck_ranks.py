"""Find the ranks that are stuck, and describe what all ranks are doing.

A stuck rank passes no mark, and shows one of two signs:

- It is *still*: it uses no CPU time, for example because a file system does not answer.
- It *loops*: since its last mark, it has used much more CPU time than ever before between two marks.

A healthy rank shows the same signs while it waits for a stuck rank. Therefore, ``find_stuck`` also compares positions.
"""

from collections.abc import Callable, Mapping, Sequence

from pipeline.distributed.main_thread import Place
from pipeline.distributed.rank_records import NAMED_RANKS


def find_stuck(places: Mapping[int, Place], timeout_s: float) -> list[int]:
    """Return the ranks that are stuck.

    An overdue rank (see ``Place.is_overdue``) is stuck if another rank has passed more marks, such as micro-batches
    or collectives. If all ranks are overdue, those that have passed the fewest marks are stuck.

    Args:
        places: what the main thread of each rank is doing.
    """
    overdue = [rank for rank, place in places.items() if place.is_overdue(timeout_s)]
    positions = [place.position for place in places.values()]
    if len(overdue) == len(places):
        return [rank for rank in overdue if places[rank].position == min(positions)]
    return [rank for rank in overdue if places[rank].position < max(positions)]


def describe_places(places: Mapping[int, Place], stuck: Sequence[int], name: Callable[[int], str]) -> str:
    """Return a text that says which ranks are stuck, and what all ranks are doing.

    Args:
        name: returns the host and the process id of a rank. It is called only for a few stuck ranks.
    """
    are_stuck = set(stuck)
    groups: dict[tuple[bool, str, str], list[int]] = {}
    for rank, place in places.items():
        groups.setdefault((rank not in are_stuck, place.phase, place.line), []).append(rank)
    texts = []
    for (is_other, phase, line), ranks in sorted(groups.items(), key=lambda item: (item[0][0], len(item[1])))[:4]:
        named = ", ".join(f"rank {rank}" + ("" if is_other else f" ({name(rank)})") for rank in ranks[:NAMED_RANKS])
        more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
        delay = "" if is_other else f" {_describe_delay([places[rank] for rank in ranks])},"
        texts.append(f"{named}{more}:{delay} in {phase} ({line})")
    return "; ".join(texts)


def _describe_delay(places: Sequence[Place]) -> str:
    idle_s, busy_s = min(place.idle_s for place in places), min(place.busy_s for place in places)
    if idle_s >= busy_s:
        return f"not moved for {idle_s:.0f} s"
    usual_s = max(place.longest_s for place in places)
    return f"no progress in {busy_s:.0f} s of CPU time (at most {usual_s:.2g} s before)"
