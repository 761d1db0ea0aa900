"""The storage of kept tiles of h, and the index lists that products (2) to (6) read.

h `[T, f]` is divided into tiles of `TILE` tokens by `TILE` neurons: a block of tokens by a group of neurons. Each block
keeps the groups in which it is most active. The kept tiles are stored contiguously, sorted by block and then by group:
`[P, TILE, TILE]`, with zeros for the missing tokens of the last block. So activation memory is proportional to the
keep share, and the operand of a product is a dense matrix of P * TILE rows.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

from torch import Tensor

TILE = 128
COUNTERS = 5  # one for each of the products (2) to (6)


def _sizes(blocks: int, groups: int, capacity: int) -> tuple[int, ...]:
    """Number of entries of each list, in the order of the properties of TileLists."""
    return blocks + 1, capacity, capacity, groups, groups, groups * blocks, COUNTERS


@cache
def bounds(blocks: int, groups: int, capacity: int) -> list[int]:
    """Offsets of the lists in the buffer, in entries, and the end of the last list."""
    return list(accumulate(_sizes(blocks, groups, capacity), initial=0))


@dataclass(frozen=True)
class TileLists:
    """Lists of the kept tiles by block of tokens and by group of neurons: views of one int32 `buffer`.

    Attributes:
        blocks, groups: B = ceil(T / TILE), F = f / TILE.
        capacity: P, the number of kept tiles.
    """

    buffer: Tensor
    blocks: int
    groups: int
    capacity: int

    @classmethod
    def of(cls, buffer: Tensor, tokens: int, hidden_dim: int, capacity: int) -> "TileLists":
        """The lists in `buffer`, for `capacity` tiles of h `[tokens, hidden_dim]`."""
        return cls(buffer, -(-tokens // TILE), hidden_dim // TILE, capacity)

    @staticmethod
    def size(blocks: int, groups: int, capacity: int) -> int:
        """Number of entries of the buffer."""
        return sum(_sizes(blocks, groups, capacity))

    @cached_property
    def _views(self) -> tuple[Tensor, ...]:
        return self.buffer.split_with_sizes(_sizes(self.blocks, self.groups, self.capacity))

    @cached_property
    def start(self) -> Tensor:
        """`[B + 1]`: the tiles of block b are start[b] to start[b + 1] - 1."""
        return self._views[0]

    @cached_property
    def tile_group(self) -> Tensor:
        """`[P]`: the group of neurons of each tile, ascending within a block."""
        return self._views[1]

    @cached_property
    def tile_block(self) -> Tensor:
        """`[P]`: the block of tokens of each tile, ascending."""
        return self._views[2]

    @cached_property
    def group_count(self) -> Tensor:
        """`[F]`: the number of blocks that keep each group."""
        return self._views[3]

    @cached_property
    def group_order(self) -> Tensor:
        """`[F]`: the groups in descending order of `group_count`; the lower index first among equal counts."""
        return self._views[4]

    @cached_property
    def group_tiles(self) -> Tensor:
        """`[F, B]`: the tiles of each group, ascending; entries after the first `group_count` are undefined."""
        return self._views[5].view(self.groups, self.blocks)

    @cached_property
    def counters(self) -> Tensor:
        """`[COUNTERS]`: the next unit of work of each product's kernel on Hopper; zero before and after a launch.

        Each product has its own counter, so independent products, such as (4), (5) and (6), can run on several streams
        at once. The same product must not run twice at once on the same lists.
        """
        return self._views[6]
