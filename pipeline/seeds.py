"""Compute the seeds of independent random generators from one seed."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, for example ``derive_seed(1337, "dropout", first_sample)``.

    The seeds of different purposes are independent.
    """
    key = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
