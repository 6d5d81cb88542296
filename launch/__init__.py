"""Define the commands of the pipeline. Each command parses its arguments and calls functions of the other packages.

Slow packages such as torch are imported after the arguments are parsed, inside the function that uses them. ``--help``
and messages about wrong arguments therefore appear at once.
"""
