"""The KV blocks of one rank, by number. The rank holds the memory; the coordinator holds the truth."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Free blocks of one rank and what running requests may still claim of them.

    A request reserves its worst case on admission, so a running request never lacks a block; blocks are taken only as
    it grows.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reserved = 0

    @property
    def num_used(self) -> int:
        """Blocks that hold some request's KV."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def can_reserve(self, num_tokens: int) -> bool:
        """Tell whether a request of ``num_tokens`` at most fits beside those admitted."""
        return self._reserved + self.blocks_for(num_tokens) <= self.num_blocks

    def reserve(self, num_tokens: int) -> None:
        """Promise blocks for ``num_tokens``."""
        assert self.can_reserve(num_tokens)
        self._reserved += self.blocks_for(num_tokens)

    def grow(self, blocks: list[int], num_tokens: int) -> None:
        """Append to a request's ``blocks`` until they hold ``num_tokens``."""
        while len(blocks) < self.blocks_for(num_tokens):
            blocks.append(self._free.pop())

    def release(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Take back a request's blocks and its promise for ``num_tokens``."""
        self._free.extend(reversed(blocks))
        self._reserved -= self.blocks_for(num_tokens)

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Raise ``RuntimeError`` unless free blocks and those ``held`` by requests make up the pool exactly."""
        everything = sorted([*self._free, *(block for blocks in held for block in blocks)])
        if everything != list(range(self.num_blocks)):
            raise RuntimeError("KV blocks leaked or are shared")
        if not held and self._reserved:
            raise RuntimeError(f"{self._reserved} KV blocks are promised to no request")
