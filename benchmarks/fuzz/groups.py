"""List all groups of inputs by name."""

from benchmarks.fuzz.data_groups import DATA_GROUPS
from benchmarks.fuzz.model_groups import MODEL_GROUPS

GROUPS = {group.name: group for group in (*DATA_GROUPS, *MODEL_GROUPS)}
