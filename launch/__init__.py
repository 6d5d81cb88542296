"""Define the commands of the pipeline.

Commands import slow packages such as torch after they have parsed their arguments. ``--help`` and messages about wrong
arguments therefore appear at once.
"""

from pipeline.distributed.environment import set_openmp_default

set_openmp_default()  # every command imports this package before it imports torch
