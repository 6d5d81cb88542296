"""Load the encoder that every worker process needs.

Workers are forked from a process that has imported this module. They therefore share its vocabulary, and start to
encode at once.
"""

from contextlib import suppress

from data_tools.encoding.encoders import choose_encoder, load_encoder
from data_tools.errors import DataError

with suppress(DataError, OSError):  # no vocabulary or no temporary folder; the worker reports it
    load_encoder(choose_encoder("auto"))
