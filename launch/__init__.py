"""Define the commands of the pipeline. Each command parses its arguments and calls functions of the other packages.

Modules that import torch, ``datasets`` or another slow package are imported only after the arguments have been parsed,
inside the function that uses them. ``--help`` and the messages about wrong arguments therefore appear at once. All
other imports are at the top of the files.
"""
