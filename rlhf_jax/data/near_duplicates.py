"""Texts that nearly repeat an earlier one, found in linear time.

Two texts are near-duplicates when half of all their pieces are shared (Jaccard similarity of the
sets of pieces), a piece being the 12 bytes from the beginning of a word on: two or three words. A
template of a dozen words in which one word changes is just so. The similarity is read from MinHash
signatures (the share of equal entries estimates it), and only texts that agree in a band of their
signatures are compared, so that two hundred thousand prompts take some seconds.

Source: Broder 1997, "On the resemblance and containment of documents" (MinHash).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, UInt32

BYTES = 1_024
"""Bytes of a text that are looked at: from longer ones the first and the last half of these."""
PIECES = 5
"""Fewer pieces than this say little: such texts are never near-duplicates."""
HASHES, BAND = 32, 2
"""Entries of a signature, and of a band of it: of texts with similarity 0.5 99% share a band."""
ALIKE = 0.5
"""Share of equal entries from which texts are near-duplicates."""
CHUNK = 10_000
"""Texts whose pieces are in memory at the same time."""


def repeats(texts: Sequence[str]) -> list[bool]:
    """For each text whether it nearly repeats an earlier one.

    Args:
      texts: different ones; case and spaces count, so normalise first. Equal texts are
        near-duplicates too.

    >>> said = "Write a short poem about the sea and a sailor who is waiting for the wind in {}."
    >>> repeats([said.format("spring"), "How do I bake a loaf of rye bread at home?", said.format("autumn")])
    [False, False, True]
    """  # noqa: E501
    found: list[bool] = []
    kept: list[UInt32[np.ndarray, " h"]] = []  # signatures of the texts that repeat none
    buckets: list[dict[bytes, int]] = [{} for _ in range(HASHES // BAND)]
    for start in range(0, len(texts), CHUNK):
        for signature in _signatures(texts[start : start + CHUNK]):
            if signature is None:
                found.append(False)
                continue
            bands = [signature[i : i + BAND].tobytes() for i in range(0, HASHES, BAND)]
            earlier = {buckets[i][band] for i, band in enumerate(bands) if band in buckets[i]}
            near = any(
                np.count_nonzero(kept[other] == signature) >= ALIKE * HASHES for other in earlier
            )
            found.append(near)
            if not near:  # texts of one template are compared with its first one alone
                kept.append(signature)
                for i, band in enumerate(bands):
                    buckets[i].setdefault(band, len(kept) - 1)
    return found


def _signatures(texts: Sequence[str]) -> Iterable[UInt32[np.ndarray, " h"] | None]:
    """MinHash signatures; None for a text of fewer than `PIECES` pieces."""
    encoded = [_shortened(text.encode("utf-8", "replace")) for text in texts]
    # A byte between texts and at both ends keeps words apart; a piece that runs into the next text
    # is its text's end.
    data = np.frombuffer(b" " + b" ".join(encoded) + b" " * 32, np.uint8)
    starts = np.flatnonzero((data[:-1] == ord(" ")) & (data[1:] != ord(" "))) + 1
    edges = 1 + np.cumsum([0, *(len(text) + 1 for text in encoded)])
    starts = starts[starts < edges[-1]]
    owner = np.searchsorted(edges, starts, side="right") - 1
    a, b = _hashed(data, starts, edges[owner + 1] - 1)
    counts = np.bincount(owner, minlength=len(texts))
    first = np.concatenate([[0], np.cumsum(counts)])
    usable = np.flatnonzero(counts >= PIECES)
    minima = np.empty((len(usable), HASHES), np.uint32)
    if len(usable):
        # The pieces of unusable texts go, so that each text's pieces end where the next usable
        # text's begin.
        mask = (counts >= PIECES)[owner]
        a, b = a[mask], b[mask]
        bounds = np.cumsum([0, *(first[usable + 1] - first[usable])[:-1]])
        for i in range(HASHES):
            minima[:, i] = np.minimum.reduceat(a + np.uint32(i) * b, bounds)
    rows = dict(zip(usable.tolist(), minima, strict=True))
    return (rows.get(i) for i in range(len(texts)))


def _shortened(data: bytes) -> bytes:
    half = BYTES // 2
    return data if len(data) <= BYTES else data[:half] + b" " + data[-half:]


def _hashed(
    data: np.ndarray, starts: Int[np.ndarray, " p"], ends: Int[np.ndarray, " p"]
) -> tuple[UInt32[np.ndarray, " p"], UInt32[np.ndarray, " p"]]:
    """Two 32-bit hashes of the 12 bytes from each of `starts` on.

    Bytes beyond the end of a text are taken as 0.
    """
    words = np.lib.stride_tricks.as_strided(data[:8].view(np.uint64), (len(data) - 8,), (1,))
    left = np.clip(ends - starts, 0, 12).astype(np.uint64)
    low, high = words[starts], words[starts + 8]
    low &= _low_bytes(np.minimum(left, np.uint64(8)))
    high &= _low_bytes(np.maximum(left, np.uint64(8)) - np.uint64(8))
    mixed = low * np.uint64(0x9E3779B97F4A7C15) ^ high * np.uint64(0xC2B2AE3D27D4EB4F)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (29, 0xC4CEB9FE1A85EC53)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(32)
    return mixed.astype(np.uint32), (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def _low_bytes(count: np.ndarray) -> np.ndarray:
    """Masks of the lowest `count` (0 to 8) bytes of a little-endian word."""
    masks = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)
    return masks[count.astype(np.int64)]
