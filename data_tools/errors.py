"""The one family of errors that a user can cause, shared by every stage."""


class UserError(Exception):
    """A mistake or a circumstance that the user can mend.

    Its text is one line: what is wrong, where, and what would be right. The commands print that
    line and exit with ``exit_status``; anything that is not a ``UserError`` is a defect of ours.
    """

    exit_status = 2


class DataError(UserError):
    """A source, a document, a shard or a manifest that cannot be used."""
