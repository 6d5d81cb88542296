"""Define the interface of a log sink, which receives a run's rows of metrics on the main rank."""

from typing import Any

Row = dict[str, Any]


class Sink:
    """Receives a run's rows of metrics. After ``start``, no method may raise, because an error stops the training.

    The values of a row are numbers, null, texts (for example under the key ``ended``), objects (``started``) or lists
    (``skipped_samples``).
    """

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        """Prepare to receive rows. Delete the rows of all steps after ``resumed_step``. The run repeats these steps.

        Args:
            config: the resolved run config.
            resumed_step: the step of the checkpoint from which the run resumes. If 0, delete all rows.
        """

    def write(self, row: Row) -> None:
        """Receive one row, which has the key ``step``."""

    def count_step(self, step: int) -> None:
        """Receive the number of steps that the run has started so far. The trainer calls this once per step."""

    def rewind(self, step: int) -> None:
        """Delete the rows of all steps after ``step``, because the run has gone back to this step."""

    def settle(self, step: int) -> None:
        """Receive the step of a saved checkpoint.

        A run that resumes from this checkpoint keeps the rows up to this step. The sink of a service can therefore send
        these rows now.
        """

    def end(self, summary: Row) -> None:
        """Write all remaining rows and the summary, and close all files.

        ``summary`` says how the run ended, and contains its last results.
        """
