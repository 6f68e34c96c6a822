"""Finds texts that nearly repeat an earlier one, in linear time.

Two texts are near-duplicates when their sets of shingles have a Jaccard similarity of at least one
half. A shingle is the 12 bytes from the start of a word, two or three words. A template of a dozen
words in which one word changes is just similar enough. The similarity is estimated from MinHash
signatures (by the share of equal entries), and only texts that agree in a band of their signatures
are compared (locality-sensitive hashing), so that two hundred thousand prompts take some seconds.

Source: Broder 1997, "On the resemblance and containment of documents" (MinHash).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, UInt32

BYTES = 1_024
"""Bytes of a text that are compared; of a longer text, the first and the last half of these."""
PIECES = 5
"""Texts with fewer shingles than this are too short to judge and never near-duplicates."""
HASHES, BAND = 32, 2
"""Entries per signature and per band; 99% of the pairs with similarity 0.5 share a band."""
ALIKE = 0.5
"""Share of equal entries from which texts are near-duplicates."""
CHUNK = 10_000
"""Texts whose shingles are in memory at the same time."""


def repeats(texts: Sequence[str]) -> list[bool]:
    """Whether each text nearly repeats an earlier one.

    Args:
      texts: usually distinct, as equal texts are near-duplicates too; case and spaces count, so
        normalise first.

    >>> said = "Write a short poem about the sea and a sailor who is waiting for the wind in {}."
    >>> repeats([said.format("spring"), "How do I bake a loaf of rye bread at home?", said.format("autumn")])
    [False, False, True]
    """  # noqa: E501
    found: list[bool] = []
    kept: list[UInt32[np.ndarray, " h"]] = []  # signatures of the texts that are not repeats
    # One table per band, as equal entries mean something only at the same place of a signature.
    buckets: list[dict[bytes, int]] = [{} for _ in range(HASHES // BAND)]
    for start in range(0, len(texts), CHUNK):
        for signature in _signatures(texts[start : start + CHUNK]):
            if signature is None:
                found.append(False)
                continue
            bands = [signature[i : i + BAND].tobytes() for i in range(0, HASHES, BAND)]
            # Texts that share at least one band are candidates; all others are never compared.
            earlier = {buckets[i][band] for i, band in enumerate(bands) if band in buckets[i]}
            near = any(
                np.count_nonzero(kept[other] == signature) >= ALIKE * HASHES for other in earlier
            )
            found.append(near)
            if not near:  # all texts of a template are compared with its first one alone
                kept.append(signature)
                for i, band in enumerate(bands):
                    buckets[i].setdefault(band, len(kept) - 1)
    return found


def _signatures(texts: Sequence[str]) -> Iterable[UInt32[np.ndarray, " h"] | None]:
    """MinHash signatures; None for a text of fewer than `PIECES` shingles."""
    encoded = [_shortened(text.encode("utf-8", "replace")) for text in texts]
    # All texts are hashed as one array. A space between texts and at both ends separates their
    # words, and `_hashed` masks the bytes of a shingle that belong to the next text.
    data = np.frombuffer(b" " + b" ".join(encoded) + b" " * 32, np.uint8)
    # A word begins where a space is followed by anything else.
    starts = np.flatnonzero((data[:-1] == ord(" ")) & (data[1:] != ord(" "))) + 1
    # Entry i is where text i begins, after the leading space and all earlier texts with their
    # spaces.
    edges = 1 + np.cumsum([0, *(len(text) + 1 for text in encoded)])
    starts = starts[starts < edges[-1]]
    owner = np.searchsorted(edges, starts, side="right") - 1
    a, b = _hashed(data, starts, edges[owner + 1] - 1)
    counts = np.bincount(owner, minlength=len(texts))
    first = np.concatenate([[0], np.cumsum(counts)])
    usable = np.flatnonzero(counts >= PIECES)
    minima = np.empty((len(usable), HASHES), np.uint32)
    if len(usable):
        # Without the shingles of unusable texts, those of each usable text end where the next
        # one's begin, which `reduceat` needs.
        mask = (counts >= PIECES)[owner]
        a, b = a[mask], b[mask]
        bounds = np.cumsum([0, *(first[usable + 1] - first[usable])[:-1]])
        # Two hashes make all others: a + i * b behaves like a family of independent hashes.
        for i in range(HASHES):
            # The smallest hash over the shingles of each text, which is one entry of its MinHash
            # signature.
            minima[:, i] = np.minimum.reduceat(a + np.uint32(i) * b, bounds)
    rows = dict(zip(usable.tolist(), minima, strict=True))
    return (rows.get(i) for i in range(len(texts)))


def _shortened(data: bytes) -> bytes:
    half = BYTES // 2
    return data if len(data) <= BYTES else data[:half] + b" " + data[-half:]


def _hashed(
    data: np.ndarray, starts: Int[np.ndarray, " p"], ends: Int[np.ndarray, " p"]
) -> tuple[UInt32[np.ndarray, " p"], UInt32[np.ndarray, " p"]]:
    """Two 32-bit hashes of the 12 bytes from each of `starts`.

    Bytes beyond the end of a text count as 0.
    """
    # A strided view reads 8 bytes at any offset without a copy per shingle.
    words = np.lib.stride_tricks.as_strided(data[:8].view(np.uint64), (len(data) - 8,), (1,))
    left = np.clip(ends - starts, 0, 12).astype(np.uint64)
    low, high = words[starts], words[starts + 8]
    low &= _low_bytes(np.minimum(left, np.uint64(8)))
    high &= _low_bytes(np.maximum(left, np.uint64(8)) - np.uint64(8))
    # Multiplied in 64 bits with wrap-around, then mixed so that each input bit affects all bits.
    mixed = low * np.uint64(0x9E3779B97F4A7C15) ^ high * np.uint64(0xC2B2AE3D27D4EB4F)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (29, 0xC4CEB9FE1A85EC53)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(32)
    # The second hash is odd, so that its multiples modulo 2^32 do not collapse.
    return mixed.astype(np.uint32), (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def _low_bytes(count: np.ndarray) -> np.ndarray:
    """Masks of the lowest `count` (0 to 8) bytes of a little-endian word."""
    masks = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)
    return masks[count.astype(np.int64)]
