"""
State tracking: parity, modular arithmetic (Deletang et al., 2022; Beck et al., 2024) and word problems of S3.

Same form as in `recall_tasks`: `inputs` and `labels`, int64 [examples, T], `IGNORE` where nothing is asked. A linear
recurrence whose transitions have eigenvalues in [0, 1] cannot do these at lengths it has not seen (Grazzi et al., 2024).
"""

from itertools import permutations

import numpy as np

from .recall_tasks import IGNORE

_GROUP = np.array(list(permutations(range(3))))
# _PRODUCT[a, b]: first the element b, then a, as indices into _GROUP.
_PRODUCT = np.array([[int(np.flatnonzero((_GROUP == a[b]).all(1))[0]) for b in _GROUP] for a in _GROUP])
_IDENTITY = 0
_SWAPS = np.array([index for index, element in enumerate(_GROUP) if (element == np.arange(3)).sum() == 1])


def parity(rng, examples, train, shortest=3, longest=40):
    """
    Bits (ids 1 and 2, padding 0) of random number; at the last one: 1 for an even number of ids 2, else 2.

    The lengths `shortest` to `longest` count the answer too, as in the published data: there is one bit less.
    """
    sizes = rng.integers(shortest, longest + 1, examples) - 1
    inputs = rng.integers(1, 3, (examples, longest - 1))
    inputs[np.arange(longest - 1) >= sizes[:, None]] = 0
    labels = np.full_like(inputs, IGNORE)
    labels[np.arange(examples), sizes - 1] = 1 + (inputs == 2).sum(1) % 2
    return inputs, labels


def modular_arithmetic(rng, examples, train, shortest=3, longest=40, modulus=5):
    """
    Numbers joined by +, - and * (ids 1, 2, 3; times before plus), then = (id 4), where the result modulo `modulus` is asked.

    The number n has the id n + 5, padding is 0. Lengths count every token and the answer.
    """
    counts = rng.integers((shortest + 1) // 2, (longest + 1) // 2 + 1, examples) - 1
    most = (longest + 1) // 2 - 1
    numbers = rng.integers(0, modulus, (examples, most))
    operators = rng.integers(1, 4, (examples, most))
    total, product, sign = np.zeros(examples, np.int64), np.ones(examples, np.int64), np.ones(examples, np.int64)
    for index in range(most):
        used = index < counts
        starts = used & ((operators[:, index - 1] != 3) if index else used)
        total = np.where(starts & (index > 0), total + sign * product, total)
        sign = np.where(starts, np.where((index > 0) & (operators[:, index - 1] == 2), -1, 1), sign)
        product = np.where(starts, numbers[:, index], np.where(used, product * numbers[:, index] % modulus, product))
    result = (total + sign * product) % modulus

    inputs = np.stack([numbers + 5, operators], 2).reshape(examples, -1)
    ends = 2 * counts - 1
    inputs[np.arange(examples), ends] = 4
    inputs[np.arange(2 * most) > ends[:, None]] = 0
    labels = np.full_like(inputs, IGNORE)
    labels[np.arange(examples), ends] = result + 5
    return inputs, labels


def s3(rng, examples, train, length=128, swaps_only=False):
    """
    Permutations of three things (ids 0 to 5); the label at every position is the product of all up to there.

    With `swaps_only` the inputs are the three transpositions, each a reflection: what one transition with a negative
    eigenvalue can do. All six need two reflections for a rotation.
    """
    inputs = rng.choice(_SWAPS, (examples, length)) if swaps_only else rng.integers(0, 6, (examples, length))
    labels = np.empty_like(inputs)
    state = np.full(examples, _IDENTITY)
    for index in range(length):
        state = _PRODUCT[inputs[:, index], state]
        labels[:, index] = state
    return inputs, labels
