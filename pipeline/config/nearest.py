"""Find the name that a user probably meant."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of several names, or None if no name is similar. Upper and lower case do not matter.

    Args:
        cutoff: the smallest similarity, from 0 to 1.
    """
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None
