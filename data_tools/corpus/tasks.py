"""The work of stage 1 as a list of tasks, which any process on any machine can do in any order.

A task is a part of the source and yields a part of the output: shards of its own. What tasks there are, and every
byte that they write, depends on the request alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from data_tools.corpus.request import TokenizeRequest
from data_tools.encoding.documents import Document, utf8_of
from data_tools.sources import Slice, Source

#: As many tasks as keep the cores of a machine busy to the end, unless they become too small or too large.
_TASKS_WANTED = 64
_SMALLEST_TASK_BYTES = 4 << 20
# About what English text has; a task then fills one shard.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Task:
    """A part of the work.

    Attributes:
        index: names the task and its shards; tasks in this order give the documents in the source's order.
        slices: of the source.
        limit_documents: how many documents with text to take of them; None: all.
    """

    index: int
    slices: tuple[Slice, ...]
    limit_documents: int | None = None

    @property
    def name(self) -> str:
        """Five digits or more; names sort as tasks do, below 100,000 of them."""
        return f"{self.index:05d}"

    def __str__(self) -> str:
        return f"task {self.index} ({self.slices[0]}{', ...' if len(self.slices) > 1 else ''})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        """What ``to_json`` gave."""
        slices = tuple(Slice(**part) for part in value["slices"])
        return cls(value["index"], slices, value["limit_documents"])


def plan_tasks(source: Source, request: TokenizeRequest) -> list[Task]:
    """Cut the work. A limit of the request is found by reading up to it, without encoding.

    Raises:
        DataError: the source cannot be read.
    """
    largest = max(request.shard_tokens * _BYTES_PER_TOKEN, _SMALLEST_TASK_BYTES)
    text_bytes = source.text_bytes()
    wanted = largest if text_bytes is None else text_bytes // _TASKS_WANTED
    task_bytes = min(max(wanted, _SMALLEST_TASK_BYTES), largest)
    tasks = list(_group(source.slices(task_bytes), task_bytes))
    if request.limit_documents is None and request.limit_bytes is None:
        return tasks
    return list(_up_to_the_limit(tasks, source, request))


def documents_of(task: Task, source: Source) -> Iterator[Document]:
    """The task's documents that have text, in order."""
    texts = (document for part in task.slices for document in source.read(part) if document)
    return islice(texts, task.limit_documents)


def _group(slices: Sequence[Slice], task_bytes: int) -> Iterator[Task]:
    """Slices that follow each other, up to ``task_bytes``; one of unknown size is a task of its own."""
    index, group, size = 0, list[Slice](), 0
    for part in slices:
        part_bytes = task_bytes if part.text_bytes is None else part.text_bytes
        if group and size + part_bytes > task_bytes:
            yield Task(index, tuple(group))
            index, group, size = index + 1, [], 0
        group.append(part)
        size += part_bytes
    if group:
        yield Task(index, tuple(group))


def _up_to_the_limit(tasks: Sequence[Task], source: Source, request: TokenizeRequest) -> Iterator[Task]:
    """The first tasks, the last of them shortened: at ``limit_documents``, or behind what reaches ``limit_bytes``."""
    documents, utf8_bytes = 0, 0
    for task in tasks:
        for taken, document in enumerate(documents_of(task, source), start=1):
            documents += 1
            utf8_bytes += len(utf8_of(document))
            if documents == request.limit_documents or utf8_bytes >= (request.limit_bytes or float("inf")):
                yield replace(task, limit_documents=taken)
                return
        yield task


#: Told by a running task, now and then: documents, tokens and bytes of text since it was last told.
Report = Callable[[int, int, int], None]
