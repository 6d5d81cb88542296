"""Define the interface of a log sink, which receives a run's rows of metrics on the main rank."""

from typing import Any

Row = dict[str, Any]


class Sink:
    """Receives the rows of metrics of a run.

    After ``start``, a sink must raise no errors, because an error would stop the training.

    Rows have different keys. A value is a number, a text of several lines (for example under the key ``sample``), an
    object (under ``started``), a list (under ``skipped_samples``) or null.
    """

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        """Prepare to receive rows. Delete all rows that the run will write again.

        Args:
            config: the resolved run config.
            resumed_step: the step of the checkpoint from which the run resumes. Rows of later steps are deleted. If the
                run starts from scratch, ``resumed_step`` is 0, and all rows are deleted.
        """

    def write(self, row: Row) -> None:
        """Receive one row. The row has the key ``step``."""

    def count_step(self, step: int) -> None:
        """Receive the number of started steps, for example to show it to the user.

        This method is called at every step. In contrast, ``write`` is called only when there is a row.
        """

    def rewind(self, step: int) -> None:
        """Delete the rows of all steps after ``step``. The run has gone back to its checkpoint of ``step``."""

    def settle(self, step: int) -> None:
        """Receive the step of a checkpoint when the checkpoint is saved.

        If the run later resumes from this checkpoint, only the rows of later steps are deleted. Therefore, a sink for
        an online service can send the rows up to ``step`` now.
        """

    def end(self, summary: Row) -> None:
        """Write all remaining rows and the summary, and close all files.

        Args:
            summary: how the run ended, and its last results.
        """
