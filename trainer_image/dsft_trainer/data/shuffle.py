"""The one shuffle that all orders of rows are made of."""

import numpy as np
from numpy.typing import NDArray


def shuffled(key: tuple[int, ...], n: int) -> NDArray[np.int64]:
    """A permutation of range(n), the same for the same key on every version of numpy."""
    # numpy keeps the raw words of a bit generator stable over versions, but not `Generator.permutation` (NEP 19), and a
    # resumed run may meet another numpy.
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")
