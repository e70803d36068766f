"""What a model of language has to beat, in bits per token: counts of tokens and pairs, and compression programs.

n tokens, V vocabulary
"""

import gzip
import lzma
import math

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]

PRIMED, COMPRESSED = 2**20, 2**18  # bytes of train and test that `lzma` sees at most, which takes a second


def unigram(train: Tokens, test: Tokens, vocab_size: int) -> float:
    """Frequencies of single tokens, add-one smoothed."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(np.log2(counts.sum() / counts)[test].mean())


def bigram(train: Tokens, test: Tokens, vocab_size: int) -> float:
    """Frequencies of a token after the one before it, add-one smoothed; the first by those of single tokens."""
    known, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    pairs = _pairs(test, vocab_size)
    place = np.minimum(np.searchsorted(known, pairs), max(0, len(known) - 1))
    seen = np.where(known[place] == pairs, counts[place], 0) if len(known) else np.zeros(len(pairs))
    before = np.bincount(train[:-1], minlength=vocab_size)[test[:-1]]
    bits = np.log2((before + vocab_size) / (seen + 1)).sum() + unigram(train, test[:1], vocab_size)
    return float(bits / len(test))


def compressed(train: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte of gzip on the test text alone, and of LZMA on it after the end of the training text."""
    primer, unseen = train[-PRIMED:], test[:COMPRESSED]
    after = len(lzma.compress(primer + unseen)) - len(lzma.compress(primer))
    return {
        "gzip": 8 * len(gzip.compress(test, mtime=0)) / len(test),
        "lzma after train": 8 * max(0, after) / len(unseen),
    }


def uniform(vocab_size: int) -> float:
    """All tokens alike."""
    return math.log2(vocab_size)


def _pairs(tokens: Tokens, vocab_size: int) -> NDArray[np.int64]:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
