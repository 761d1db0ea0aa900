"""Kept tiles of h and the lists that products (2) to (6) walk.

h `[T, f]` is cut into tiles of `TILE` tokens x `TILE` neurons: a block of tokens by a group of neurons. A block keeps
the groups in which it is most active. What is kept is stored as tiles one after the other, by block, inside a block by
group: `[P, TILE, TILE]`, the last block's missing tokens zero. So activation memory falls with the keep share, and a
product's operand is a plain matrix of P * TILE rows.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

from torch import Tensor

TILE = 128
COUNTERS = 5  # products (2) to (6)


def _sizes(blocks: int, groups: int, capacity: int) -> tuple[int, ...]:
    """Entries of the lists, in the order of TileLists' properties."""
    return blocks + 1, capacity, capacity, groups, groups, groups * blocks, COUNTERS


@cache
def bounds(blocks: int, groups: int, capacity: int) -> list[int]:
    """Where the lists begin in the buffer, and where the last one ends."""
    return list(accumulate(_sizes(blocks, groups, capacity), initial=0))


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
        return sum(_sizes(blocks, groups, capacity))

    @cached_property
    def _views(self) -> tuple[Tensor, ...]:
        return self.buffer.split_with_sizes(_sizes(self.blocks, self.groups, self.capacity))

    @cached_property
    def start(self) -> Tensor:
        """`[B + 1]`: tiles of block b are start[b] to start[b + 1]."""
        return self._views[0]

    @cached_property
    def tile_group(self) -> Tensor:
        """`[P]`: the group of neurons of each tile, ascending inside a block."""
        return self._views[1]

    @cached_property
    def tile_block(self) -> Tensor:
        """`[P]`: the block of tokens of each tile, ascending."""
        return self._views[2]

    @cached_property
    def group_count(self) -> Tensor:
        """`[F]`: blocks that keep each group."""
        return self._views[3]

    @cached_property
    def group_order(self) -> Tensor:
        """`[F]`: groups, the one that most blocks keep first; among equals the lower index."""
        return self._views[4]

    @cached_property
    def group_tiles(self) -> Tensor:
        """`[F, B]`: the tiles of each group, ascending; entries past its count have no meaning."""
        return self._views[5].view(self.groups, self.blocks)

    @cached_property
    def counters(self) -> Tensor:
        """`[COUNTERS]`: the next work of each product's kernel on Hopper, zero before and after it.

        Each product has its own, so those that do not wait for each other, such as (4), (5) and (6), may run on several
        streams. One product must not run twice at a time on the same lists.
        """
        return self._views[6]
