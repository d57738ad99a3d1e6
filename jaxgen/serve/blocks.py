"""Which blocks of a paged cache hold what: references, and a cache of prefixes seen before."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL = 0
"""Never handed out: rows without a token of their own write into it."""


class Blocks:
    """The blocks of one pool, each of `block_size` tokens.

    A full block may be remembered under a key that says all tokens up to its end. Nobody's any
    more, it stays until its room is needed, the least recently used first; a request whose prompt
    begins with the same tokens takes it over as it is. Blocks are never written once full, so any
    number of requests may share one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True):
        """Starts with all blocks free.

        Args:
            num_blocks: block `NULL` included.
            block_size: tokens in each.
            prefix_cache: whether full blocks are remembered.
        """
        self.num_blocks, self.block_size = num_blocks, block_size
        self.prefix_cache = prefix_cache
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, NULL, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # Remembered and nobody's, oldest first.
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - 1 - self.available

    def needed(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """Returns blocks that hold nothing, one reference each, or None if there are too few."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                block, _ = self._idle.popitem(last=False)
                del self._by_key[self._key_of.pop(block)]
                self._free.append(block)
            block = self._free.pop()
            self.references[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the blocks remembered under the first keys, with one more reference each."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self.references[block] += 1
            found.append(block)
        return found

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one reference off each."""
        # From the end: a prefix is of use without what follows it, but not the other way round.
        for block in reversed(blocks):
            assert self.references[block] > 0, f"block {block} is nobody's"
            self.references[block] -= 1
            if self.references[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def remember(self, block: int, key: bytes) -> None:
        """Says that a block is full, and of what. The first of several alike is kept."""
        assert self.references[block] > 0, f"block {block} is nobody's"
        if self.prefix_cache and key not in self._by_key and block not in self._key_of:
            self._by_key[key] = block
            self._key_of[block] = key


class Chain:
    """The keys of a sequence's full blocks: each is a hash of all tokens up to the block's end."""

    def __init__(self, block_size: int, salt: bytes):
        """Starts an empty sequence; keys of different salts never meet."""
        self.keys: list[bytes] = []
        self._block_size, self._last = block_size, salt

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds the keys of blocks that have become full; `tokens` is the whole sequence."""
        for start in range(
            len(self.keys) * self._block_size,
            len(tokens) - self._block_size + 1,
            self._block_size,
        ):
            content = array("q", tokens[start : start + self._block_size]).tobytes()
            # 128 bits: two prompts that meet would show one user's text to another.
            self._last = hashlib.blake2b(self._last + content, digest_size=16).digest()
            self.keys.append(self._last)
