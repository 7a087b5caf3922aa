"""The KV blocks of one rank, by number. The rank holds the memory; the coordinator holds the truth."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Free blocks of one rank. A request takes blocks as it grows and gives them back when it leaves."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that hold some request's KV."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def room(self, blocks: Sequence[int]) -> int:
        """Return how many tokens a request that holds ``blocks`` could have KV for, at most."""
        return (len(blocks) + len(self._free)) * self.block_size

    def grow(self, blocks: list[int], num_tokens: int) -> None:
        """Append to a request's ``blocks`` until they hold ``num_tokens``, which must be within `room`."""
        assert num_tokens <= self.room(blocks)
        while len(blocks) < self.blocks_for(num_tokens):
            blocks.append(self._free.pop())

    def shrink(self, blocks: list[int], num_tokens: int) -> None:
        """Take back the blocks that a request does not need to hold ``num_tokens``."""
        while len(blocks) > self.blocks_for(num_tokens):
            self._free.append(blocks.pop())

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Raise ``RuntimeError`` unless free blocks and those ``held`` by requests make up the pool exactly."""
        everything = sorted([*self._free, *(block for blocks in held for block in blocks)])
        if everything != list(range(self.num_blocks)):
            raise RuntimeError("KV blocks leaked or are shared")
