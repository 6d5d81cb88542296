"""Define the commands of the pipeline.

Commands parse their arguments before they import slow packages such as torch. ``--help`` and messages about wrong
arguments therefore appear at once.
"""

from pipeline.distributed.environment import set_openmp_default

set_openmp_default()  # every command imports this package before it imports torch
