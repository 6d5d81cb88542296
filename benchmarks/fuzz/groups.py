"""List all groups by name."""

from benchmarks.fuzz.data_groups import DATA_GROUPS

GROUPS = {group.name: group for group in DATA_GROUPS}
