"""Start the process from which this machine's worker processes are forked.

The module imports no slow package, so that a command can start the process before its own imports.
"""

import os

from data_tools.corpus.parallel import start_server
from data_tools.corpus.request import TokenizeRequest
from data_tools.limits import available_cores, memory_limit

#: Memory of one process while it encodes. docs/benchmarks/data.md has the measurement.
WORKER_BYTES = 350 << 20
_LARGE_INPUT_BYTES = 8 << 20  # several chunks, unless a compressed file is one chunk


def start_worker_server(request: TokenizeRequest) -> None:
    """Start the process from which workers will be forked. Do not wait until it is ready.

    If the request needs only one process, do nothing.
    """
    if request.engine == "local" and workers_of(request) > 1:
        start_server(worker_modules(request))


def has_large_input(request: TokenizeRequest) -> bool:
    """Return whether the input files are so large that the request almost certainly needs workers."""
    return sum(os.path.getsize(path) for path in request.inputs if os.path.isfile(path)) >= _LARGE_INPUT_BYTES


def worker_modules(request: TokenizeRequest) -> tuple[str, ...]:
    """Return the modules to import once for all workers."""
    worker = "data_tools.corpus.worker"
    return (worker,) if request.encoder == "tiktoken" else ("data_tools.corpus.warm", worker)


def workers_of(request: TokenizeRequest) -> int:
    """Return how many worker processes to start on this machine.

    This is the number in the request. By default, it is one process per core, or fewer if they need too much memory.
    """
    return request.workers or max(1, min(available_cores(), memory_limit() // WORKER_BYTES))
