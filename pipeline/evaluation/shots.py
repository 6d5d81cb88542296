"""Few-shot examples, drawn as lm-evaluation-harness draws them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from data_tools.errors import DataError

Example = TypeVar("Example")

SHOTS_SEED = 1234  # lm-evaluation-harness' default fewshot_random_seed


def draw_shots(
    examples: Sequence[Example], pool: Sequence[Example], count: int, *, spare: bool
) -> list[Sequence[Example]]:
    """``count`` examples for each example, from one stream of random numbers in the order of the examples.

    Args:
        spare: draw one more than needed, so that an example is never among its own. As the harness does for tasks
            without a test split; for the others it draws as many as needed.

    Raises:
        DataError: the pool is too small.
    """
    if not count:
        return [()] * len(examples)
    if len(pool) < count + spare:
        raise DataError(f"--shots {count}: there are only {len(pool) - spare} examples to draw from")
    stream = random.Random(SHOTS_SEED)
    if not spare:
        return [stream.sample(pool, count) for _ in examples]
    return [_all_but(example, stream, pool, count) for example in examples]


def _all_but(example: Example, stream: random.Random, pool: Sequence[Example], count: int) -> Sequence[Example]:
    drawn = [other for other in stream.sample(pool, count + 1) if other != example][:count]
    if len(drawn) < count:  # the pool holds it several times
        others = [other for other in pool if other != example]
        if len(others) < count:
            raise DataError(f"--shots {count}: there are only {len(others)} other examples to draw from")
        drawn = stream.sample(others, count)
    return drawn
