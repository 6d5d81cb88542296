"""``launch/train.py`` on instruction-like data: a prompt of its own length in each sample is not scored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from launch.cli import ArgumentParser, add_config_options, run_command, start_logging
from pipeline.config_files import load_config
from pipeline.sample_order import IndexArray
from pipeline.seeds import derive_seed
from pipeline.training_run import train


def prompt_mask(starts: IndexArray, seq_len: int) -> npt.NDArray[np.bool_]:
    """False on the first 0 to ``seq_len - 1`` targets of each window: very unequal counts, (B, T)."""
    prompt_lengths = np.array([derive_seed(0, "prompt", int(start)) % seq_len for start in starts])
    return np.arange(seq_len) >= prompt_lengths[:, None]


def main() -> None:
    """As ``launch/train.py``."""
    parser = ArgumentParser(
        description=__doc__, example="python -m benchmarks.masked_train --config ds_configs/ddp.json"
    )
    add_config_options(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    start_logging()
    train(config, prompt_mask)


if __name__ == "__main__":
    run_command(main)
