"""
Recall and copying: MQAR (Arora et al., Zoology, 2023) and the five sequence tasks of MAD (Poli et al., 2024).

Every generator returns `inputs` and `labels`, int64 [examples, T]: the label at a position is what the logits there should
predict (already shifted), and `IGNORE` where nothing is asked. MAD trains its in-context tasks on every next token and
tests only what can be known; `train` chooses.
"""

import numpy as np

IGNORE = -100


def multi_query_recall(rng, examples, train, vocab=8192, length=512, pairs=64, power=0.01, random_filling=False):
    """
    MQAR: `pairs` distinct keys and values, then each key once more; its value is asked for at the key.

    Keys are ids 1 ... V/2-1, values V/2 ... V-1. Behind the pairs are length/2 - pairs slots of two tokens; slot i holds a
    query with weight i^(power-1), so that with the default most queries come early. Other positions are 0, or random with
    `random_filling`. Train and test are alike.
    """
    space = length // 2 - pairs
    if space < pairs or length % 2:
        raise ValueError(f"length {length} with {pairs} pairs: it must be even and at least 4 * pairs")
    keys = 1 + _distinct(rng, examples, vocab // 2 - 1, pairs)
    values = vocab // 2 + _distinct(rng, examples, vocab - vocab // 2, pairs)
    weight = (power - 1) * np.log(np.arange(1, space + 1))
    slots = _distinct(rng, examples, space, pairs, weight)

    inputs = np.zeros((examples, length), np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    labels = np.full_like(inputs, IGNORE)
    np.put_along_axis(inputs, 2 * pairs + 2 * slots, keys, 1)
    np.put_along_axis(labels, 2 * pairs + 2 * slots, values, 1)
    if random_filling:
        inputs = np.where(inputs == 0, rng.integers(0, vocab, inputs.shape), inputs)
    return inputs, labels


def in_context_recall(rng, examples, train, vocab=16, length=128, noise_vocab=0, noise=0.0):
    """
    Pairs of a key and its value, the same value for a key throughout the sequence; the last key has come before.

    Of the `vocab - noise_vocab` ids the lower half are keys, the upper half values. With `noise` that share of the pairs is
    two random ids of the noise vocabulary instead. Asked in testing: values of keys that have come before.
    """
    count = length // 2
    symbols = vocab - noise_vocab
    value_of = rng.integers(symbols // 2, symbols, (examples, symbols // 2))
    keys = rng.integers(0, symbols // 2, (examples, count))
    real = rng.random((examples, count)) >= noise
    real[np.arange(examples), rng.integers(0, count - 1, examples)] = True
    real[:, -1] = True
    seen = np.zeros(value_of.shape, bool)
    repeated = np.zeros(keys.shape, bool)
    rows = np.arange(examples)
    for index in range(count):
        if index == count - 1:
            keys[:, -1] = np.where(seen, rng.random(seen.shape), -1).argmax(1)
        repeated[:, index] = real[:, index] & seen[rows, keys[:, index]]
        seen[rows, keys[:, index]] |= real[:, index]

    pairs = np.stack([keys, np.take_along_axis(value_of, keys, 1)], 2)
    if noise_vocab:
        pairs = np.where(real[..., None], pairs, rng.integers(symbols, vocab, pairs.shape))
    targets = np.full_like(pairs, IGNORE)
    targets[..., 1] = np.where(repeated, pairs[..., 1], IGNORE)
    return _shifted(pairs.reshape(examples, -1), targets.reshape(examples, -1), train)


def fuzzy_recall(rng, examples, train, vocab=16, length=128, motif=3):
    """
    In-context recall with keys and values of one to `motif` different tokens; in testing all keys have `motif` tokens.

    Ids below (V-1)//2 make keys, the others values, and V-1 fills up on the left. One pair, drawn beforehand, stands
    somewhere in the sequence and again at its end, where its value is asked for, as are values of other repeated keys.
    """
    parts = (vocab - 1) // 2
    if length < 8 * motif or parts < motif:
        raise ValueError(f"length {length}, vocab {vocab} with motifs of {motif}: at least 8 and 2 motifs are needed")
    salt = rng.integers(0, 2**63, examples, dtype=np.uint64)
    rows = np.arange(examples)
    inputs = np.full((examples, length + 1 + 2 * motif), vocab - 1, np.int64)
    targets = np.full_like(inputs, IGNORE)
    cursor = np.zeros(examples, np.int64)
    codes = np.full((examples, length), -1, np.int64)

    probe, probe_size = _motifs(rng, examples, parts, motif, train)
    probe_value, probe_value_size = _values(salt, probe, probe_size, parts, vocab - 1 - parts, motif)
    limit = length - probe_size - probe_value_size - 2 * motif
    place = (rng.random(examples) * (limit - 2 * motif + 1)).astype(np.int64)
    placed = np.zeros(examples, bool)
    step = 0
    while (active := cursor < limit).any():
        key, size = _motifs(rng, examples, parts, motif, train)
        now = active & ~placed & (cursor >= place)
        key, size = np.where(now[:, None], probe, key), np.where(now, probe_size, size)
        code = _code(key, size, parts)
        placed |= active & (code == _code(probe, probe_size, parts))
        known = (codes == code[:, None]).any(1)
        codes[:, step] = np.where(active, code, -1)
        value, value_size = _values(salt, key, size, parts, vocab - 1 - parts, motif)
        _append(inputs, targets, cursor, rows, (key, size), (value, value_size), active, known)
        step += 1
    every = np.ones(examples, bool)
    _append(inputs, targets, cursor, rows, (probe, probe_size), (probe_value, probe_value_size), every, every)

    shift = (length + 1 - cursor)[:, None]
    return _shifted(_moved(inputs, shift, length + 1, vocab - 1), _moved(targets, shift, length + 1, IGNORE), train)


def memorization(rng, examples, train, vocab=256, length=32, map_seed=12345):
    """Facts: a fixed map from keys to values (one for training and testing), asked for at the token V-1 behind each key."""
    half = (vocab - 1) // 2
    facts = np.random.default_rng(map_seed)
    value_of = half + facts.permutation(vocab - 1 - half)[:half]
    keys = rng.integers(0, half, (examples, length // 2))
    inputs = np.stack([keys, np.full_like(keys, vocab - 1)], 2).reshape(examples, -1)
    labels = np.stack([np.full_like(keys, IGNORE), value_of[keys]], 2).reshape(examples, -1)
    return inputs, labels


def selective_copying(rng, examples, train, vocab=16, length=256, tokens=16):
    """
    `tokens` random ids among blanks (V-2), the last right before the copy sign (V-1); they are asked for, in order, at the
    blanks that follow it.
    """
    blanks = length - 2 * tokens - 1
    if blanks < 0:
        raise ValueError(f"length {length} with {tokens} tokens: at least 2 * tokens + 1")
    copied = rng.integers(0, vocab - 2, (examples, tokens))
    before = rng.integers(0, tokens, (examples, blanks))
    places = np.arange(tokens) + (before[:, :, None] <= np.arange(tokens)).sum(1)
    inputs = np.full((examples, length), vocab - 2, np.int64)
    np.put_along_axis(inputs, places, copied, 1)
    inputs[:, tokens + blanks] = vocab - 1
    labels = np.full_like(inputs, IGNORE)
    labels[:, -tokens:] = copied
    return inputs, labels


def _distinct(rng, examples, choices, count, log_weight=None):
    """`count` different numbers below `choices` a row, in the order of drawing without replacement."""
    if log_weight is None and count**2 <= 2 * choices:
        return _without_repeats(rng, examples, choices, count)
    chosen = np.empty((examples, count), np.int64)
    for start in range(0, examples, 2048):
        part = chosen[start : start + 2048]
        shape = (len(part), choices)
        # Gumbel's trick.
        scores = rng.random(shape, np.float32) if log_weight is None else -rng.gumbel(size=shape) - log_weight
        top = np.argpartition(scores, count - 1, 1)[:, :count]
        order = np.argsort(np.take_along_axis(scores, top, 1), 1)
        part[:] = np.take_along_axis(top, order, 1)
    return chosen


def _without_repeats(rng, examples, choices, count):
    """Rows are drawn again until they have no repeat; with count**2 <= 2 * choices a third of them succeeds each time."""
    chosen = rng.integers(0, choices, (examples, count))
    open_rows = np.arange(examples)
    while open_rows.size:
        ordered = np.sort(chosen[open_rows], 1)
        open_rows = open_rows[(ordered[:, 1:] == ordered[:, :-1]).any(1)]
        chosen[open_rows] = rng.integers(0, choices, (open_rows.size, count))
    return chosen


def _shifted(tokens, targets, train):
    """Inputs without the last token; labels are the next tokens in training, the next targets in testing."""
    return tokens[:, :-1].copy(), (tokens if train else targets)[:, 1:].copy()


def _moved(tokens, shift, length, filler):
    """Rows moved to the right by `shift` [examples, 1], cut to `length`, with `filler` on the left."""
    source = np.arange(length) - shift
    return np.where(source >= 0, np.take_along_axis(tokens, np.maximum(source, 0), 1), filler)


def _motifs(rng, examples, parts, motif, train):
    """Keys of different tokens, [examples, motif] and their sizes."""
    size = rng.integers(1, motif + 1, examples) if train else np.full(examples, motif)
    return rng.random((examples, parts)).argsort(1)[:, :motif], size


def _code(key, size, parts):
    """One number for each key of each size."""
    used = np.arange(key.shape[1]) < size[:, None]
    return (np.where(used, key + 1, 0) * (parts + 1) ** np.arange(key.shape[1])).sum(1)


def _values(salt, key, size, parts, count, motif):
    """A row's value of a key: different tokens from `parts` on and their number, a fixed random function of row and key."""
    code = _code(key, size, parts).astype(np.uint64)
    mixed = _mix(salt[:, None] ^ _mix(code[:, None] + np.arange(count + 1, dtype=np.uint64) * np.uint64(2**40)))
    return parts + mixed[:, 1:].argsort(1)[:, :motif], 1 + (mixed[:, 0] % np.uint64(motif)).astype(np.int64)


def _mix(x):
    """The finaliser of splitmix64, a bijection of 64-bit numbers whose outputs look random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _append(inputs, targets, cursor, rows, key, value, active, asked):
    """Write a key and its value behind `cursor` in the active rows; the value is a target where asked for."""
    for tokens, size, is_value in ((*key, False), (*value, True)):
        for index in range(tokens.shape[1]):
            write = active & (index < size)
            inputs[rows[write], cursor[write]] = tokens[write, index]
            if is_value:
                targets[rows[write & asked], cursor[write & asked]] = tokens[write & asked, index]
            cursor += write
