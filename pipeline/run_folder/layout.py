"""Define the names of the files and folders in a run folder."""

from pathlib import Path

CONFIG_FILE = "config.json"  # the resolved run config
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
TABLE_FILE = "metrics.csv"  # the rows of metrics.jsonl as a table
TENSORBOARD_FOLDER = "tensorboard"
CHECKPOINTS_FOLDER = "checkpoints"
PROFILE_FOLDER = "profile"
REPORT_FOLDER = "report"
REPORT_PAGE = f"{REPORT_FOLDER}/report.html"
EVALUATION_FOLDER = "evaluation"  # one JSON file per task
LOCK_FILE = "run.lock"
HEARTBEAT_FILE = "heartbeat.json"  # for programs outside of the run
FLIGHT_RECORDER_FOLDER = "flight_recorder"  # one file per rank, after a collective has timed out
REMOTE_FILE = "remote.json"  # the URLs with copies of this run's checkpoints


def run_folder_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint, or the checkpoint folder itself if it is not in a run folder."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS_FOLDER else checkpoint
