"""Load the fastest encoder for all worker processes.

Workers are forked from a process that has imported this module. They therefore share the encoder's vocabulary, and
start to encode at once.
"""

from contextlib import suppress

from data_tools.encoding.encoders import choose_encoder, load_encoder

with suppress(Exception):  # a damaged package may raise anything; a worker that needs the encoder reports the error
    load_encoder(choose_encoder("auto"))
