"""Which bit of a file was flipped: a few numbers, kept beside the file's hash, from which one flipped bit is found.

The XOR over all set bits of their positions (Hamming 1950): when exactly one bit changes, it changes by that bit's
position. Positions are counted in 64-bit words, in chunks, so that the XOR folds whole arrays at memory speed. A guess
is only a guess when more than one bit changed: the caller proves it with the hash of the mended file.
"""

from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 22
PIECE_BYTES = 1 << 18
"""What a core's cache holds: more is slower to go over twice."""
_WORDS = CHUNK_BYTES // 8
_COLUMNS = 512
_PIECES, _ROWS = CHUNK_BYTES // PIECE_BYTES, PIECE_BYTES // 8 // _COLUMNS


class Syndrome:
    """Taken over a file's bytes in order.

    A chunk's words lie in rows, so a word's number is its row's and its column's. Rows and columns are XORed over all
    chunks, and their numbers found once, at the end.
    """

    def __init__(self) -> None:
        self._piece = bytearray(PIECE_BYTES)
        self._filled = self._pieces = self._number = 0
        self._columns, self._rows = np.zeros(_COLUMNS, np.uint64), np.zeros((_PIECES, _ROWS), np.uint64)

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        while len(data):
            if self._filled == 0 and len(data) >= PIECE_BYTES:
                words: Any = np.frombuffer(data[:PIECE_BYTES], dtype=np.uint64)
                if words.flags.aligned:  # else numpy is slower than one more copy
                    self._fold(words)
                    data = data[PIECE_BYTES:]
                    continue
            part = data[: PIECE_BYTES - self._filled]
            self._piece[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == PIECE_BYTES:
                self._fold(np.frombuffer(self._piece, dtype=np.uint64))

    def text(self) -> str:
        """The numbers, for the manifest: XORs over all set bits of one bit per place in a word, the word's number in
        its chunk, the chunk's number."""
        if self._filled:
            self._piece[self._filled :] = bytes(PIECE_BYTES - self._filled)
            self._fold(np.frombuffer(self._piece, dtype=np.uint64))
        bits, column = _places(self._columns)
        _, row = _places(self._rows.reshape(-1))
        return f"{bits:x}-{row * _COLUMNS + column:x}-{self._number:x}"

    def _fold(self, words: Any) -> None:
        chunk, place = divmod(self._pieces, _PIECES)
        grid = words.reshape(_ROWS, _COLUMNS)
        rows = np.bitwise_xor.reduce(grid, axis=1)
        self._columns ^= np.bitwise_xor.reduce(grid, axis=0)
        self._rows[place] ^= rows
        if int(np.bitwise_xor.reduce(rows)).bit_count() % 2:
            self._number ^= chunk
        self._pieces += 1
        self._filled = 0


def _places(words: Any) -> tuple[int, int]:
    """The XOR of a power of two of words, and that of their numbers, each as often as its word has bits set."""
    place = 0
    while len(words) > 1:
        low, high = np.split(words, 2)
        if int(np.bitwise_xor.reduce(high)).bit_count() % 2:
            place |= len(high)
        words = low ^ high
    return int(words[0]), place


def flipped_bit(is_: str, was: str) -> tuple[int, int] | None:
    """The byte and the bit in it that tell two syndromes apart, if one flipped bit can; None if more must differ."""
    bits, word, chunk = (int(a, 16) ^ int(b, 16) for a, b in zip(is_.split("-"), was.split("-"), strict=True))
    if bits.bit_count() != 1 or word >= _WORDS:
        return None
    bit = bits.bit_length() - 1  # words are little-endian
    return chunk * CHUNK_BYTES + word * 8 + bit // 8, bit % 8
