"""Upload the checkpoints of a run folder once, in a process of its own that a test can kill.

Usage: mirror_once.py URL RUN_FOLDER PID_FILE
"""

import os
import sys
from pathlib import Path

import torch

from pipeline.checkpoint.mirror import Mirror
from pipeline.distributed.world import World

if __name__ == "__main__":
    url, run_folder, pid_file = sys.argv[1:]
    Path(pid_file).write_text(str(os.getpid()))
    mirror = Mirror(url, Path(run_folder), World(0, 1, 0, torch.device("cpu")), keep_last=2, timeout_s=60)
    mirror.start()
    problems = [outcome.problem for outcome in mirror.finish(lambda: None) if outcome.problem]
    sys.exit("; ".join(problems) or 0)
