"""Which bit of a file was flipped: a few numbers, kept beside the file's hash, from which one flipped bit is found.

The XOR over all set bits of their positions (Hamming 1950): when exactly one bit changes, it changes by that bit's
position. Positions are counted in 64-bit words, in chunks, so that the XOR folds whole arrays at memory speed. A guess
is only a guess when more than one bit changed: the caller proves it with the hash of the mended file.
"""

from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 22
_WORDS = CHUNK_BYTES // 8
_COLUMNS = 2048


class Syndrome:
    """Taken over a file's bytes in order."""

    def __init__(self) -> None:
        self._chunk = bytearray(CHUNK_BYTES)
        self._filled = self._chunks = 0
        self._bits = self._word = self._number = 0
        """XORs over all set bits of: one bit per place in a word, the word's number in its chunk, the chunk's."""

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        while len(data):
            if self._filled == 0 and len(data) >= CHUNK_BYTES:
                words: Any = np.frombuffer(data[:CHUNK_BYTES], dtype=np.uint64)
                if words.flags.aligned:  # else numpy is slower than one more copy
                    self._fold(words)
                    data = data[CHUNK_BYTES:]
                    continue
            piece = data[: CHUNK_BYTES - self._filled]
            self._chunk[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == CHUNK_BYTES:
                self._fold(np.frombuffer(self._chunk, dtype=np.uint64))

    def text(self) -> str:
        """The numbers, for the manifest."""
        if self._filled:
            length = max(8, 1 << (self._filled - 1).bit_length())  # folding halves it again and again
            self._chunk[self._filled : length] = bytes(length - self._filled)
            self._fold(np.frombuffer(self._chunk, dtype=np.uint64, count=length // 8))
        return f"{self._bits:x}-{self._word:x}-{self._number:x}"

    def _fold(self, words: Any) -> None:
        """Add a chunk. Its words lie in rows, so a word's number is its row's and its column's."""
        grid = words.reshape(-1, min(len(words), _COLUMNS))
        bits, column = _places(np.bitwise_xor.reduce(grid, axis=0))
        _, row = _places(np.bitwise_xor.reduce(grid, axis=1))
        self._bits ^= bits
        self._word ^= row * grid.shape[1] + column
        if bits.bit_count() % 2:
            self._number ^= self._chunks
        self._chunks += 1
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
