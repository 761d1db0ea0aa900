"""Kept tiles of h and the lists that products (2) to (6) walk.

h `[T, f]` is cut into tiles of `TILE` tokens x `TILE` neurons: a block of tokens by a group of neurons. A block keeps
the groups in which it is most active. What is kept is stored as tiles one after the other, by block, inside a block by
group: `[P, TILE, TILE]`, the last block's missing tokens zero. So activation memory falls with the keep share, and a
product's operand is a plain matrix of P * TILE rows.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

TILE = 128


@dataclass(frozen=True)
class TileLists:
    """The kept tiles by block of tokens and by group of neurons: views of one int32 `buffer`.

    Attributes:
        blocks, groups: B = ceil(T / TILE), F = f / TILE.
        capacity: P, tiles that there are.
    """

    buffer: Tensor
    blocks: int
    groups: int
    capacity: int

    @classmethod
    def of(cls, buffer: Tensor, tokens: int, hidden_dim: int, capacity: int) -> "TileLists":
        """The lists in `buffer`, of so many tiles of h `[tokens, hidden_dim]`."""
        return cls(buffer, -(-tokens // TILE), hidden_dim // TILE, capacity)

    @staticmethod
    def size(blocks: int, groups: int, capacity: int) -> int:
        """Entries of the buffer."""
        return blocks + 1 + 2 * capacity + 2 * groups + groups * blocks

    @cached_property
    def _bounds(self) -> list[int]:
        """Where the lists begin in the buffer, in the order of the properties below, and where the last one ends."""
        sizes = self.blocks + 1, self.capacity, self.capacity, self.groups, self.groups, self.groups * self.blocks
        return list(accumulate(sizes, initial=0))

    def _view(self, index: int) -> Tensor:
        return self.buffer[self._bounds[index] : self._bounds[index + 1]]

    def addresses(self) -> dict[str, int]:
        """The device address of every list, by its property's name."""
        names = "start", "tile_group", "tile_block", "group_count", "group_order", "group_tiles"
        first = self.buffer.data_ptr()
        return {name: first + 4 * bound for name, bound in zip(names, self._bounds, strict=False)}

    @cached_property
    def start(self) -> Tensor:
        """`[B + 1]`: tiles of block b are start[b] to start[b + 1]."""
        return self._view(0)

    @cached_property
    def tile_group(self) -> Tensor:
        """`[P]`: the group of neurons of each tile, ascending inside a block."""
        return self._view(1)

    @cached_property
    def tile_block(self) -> Tensor:
        """`[P]`: the block of tokens of each tile, ascending."""
        return self._view(2)

    @cached_property
    def group_count(self) -> Tensor:
        """`[F]`: blocks that keep each group."""
        return self._view(3)

    @cached_property
    def group_order(self) -> Tensor:
        """`[F]`: groups, the one that most blocks keep first; among equals the lower index."""
        return self._view(4)

    @cached_property
    def group_tiles(self) -> Tensor:
        """`[F, B]`: the tiles of each group, ascending; entries past its count have no meaning."""
        return self._view(5).view(self.groups, self.blocks)
