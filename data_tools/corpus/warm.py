"""Import what worker processes need, and load the fastest encoder.

Workers are forked from a process that has imported this module. They therefore share the encoder's vocabulary, and
start to encode at once.
"""

import gc
from contextlib import suppress

gc.disable()  # makes the imports faster
with suppress(Exception):  # a damaged package may raise anything; a worker that needs the encoder reports the error
    import data_tools.corpus.worker  # noqa: F401 (the workers run it)
    from data_tools.encoding.encoders import choose_encoder, load_encoder

    load_encoder(choose_encoder("auto"))
gc.freeze()  # the garbage collectors of the workers then do not copy the shared memory
gc.enable()
