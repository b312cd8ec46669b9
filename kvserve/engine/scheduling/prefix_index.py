# SPDX-License-Identifier: Apache-2.0
"""Finds the cached pages of a prefix by the hashes of its blocks.

A block of tokens has a page in every lane, ninety of them in a small model, so pages
are looked up together: one record a block. A page that is in a record carries the
record's key as its hash. The pool takes the hash from a page when it gives the page out
again or is reset, so a record needs no notice: a page without its key is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

from kvserve.plan.prefix import PrefixPages

_FEW_RECORDS = 1024


@dataclass(slots=True)
class CachedBlock:
    """Pages of one block of tokens.

    Attributes:
        key: hash of the tokens up to the block's end, and of all else they depend on.
        block: its number in the text.
        pages: by place, the null page where there was none.
        needs: what a request needs of them.
    """

    key: BlockHashWithGroupId
    block: int
    pages: list[KVCacheBlock]
    needs: PrefixPages

    def has(self, places: Iterable[int]) -> bool:
        """Tell whether the pages of all these places are still there."""
        key, pages = self.key, self.pages
        return all(pages[place].block_hash == key for place in places)

    def is_gone(self) -> bool:
        return all(page.block_hash != self.key for page in self.pages)


class PrefixIndex:
    """Cached blocks by hash.

    Args:
        null_page: stands where there is no page.
        group_id: vLLM's number of the pool's KV cache group.
    """

    def __init__(self, null_page: KVCacheBlock, group_id: int) -> None:
        self._null_page, self._group_id = null_page, group_id
        self._records: dict[BlockHash, CachedBlock] = {}
        self._most_records = _FEW_RECORDS

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> Mapping[BlockHash, CachedBlock]:
        """Records by hash, of which some may be gone."""
        return self._records

    def insert(
        self,
        block_hash: BlockHash,
        pages: Sequence[KVCacheBlock],
        block: int,
        num_tokens: int,
        needs: PrefixPages,
    ) -> None:
        """Name the pages of a full block.

        Pages that were known under the name lose it: of equal pages the youngest is
        the one that will be free last.

        Args:
            pages: by place, the null page where the request holds none any more.
            block: its number in the text.
            num_tokens: tokens up to the block's end.
        """
        record = self._records.get(block_hash)
        if record is None:
            self._sweep()
            key = make_block_hash_with_group_id(block_hash, self._group_id)
            record = CachedBlock(key, block, [self._null_page] * len(pages), needs)
            self._records[block_hash] = record
        # Pages that are gone are dropped before any is named: one of them may have
        # come back as the page of another place of this very block.
        kept = [
            page if page.block_hash == record.key else self._null_page
            for page in record.pages
        ]
        for place, page in enumerate(pages):
            if page.is_null or page is kept[place]:
                continue
            if not kept[place].is_null:
                _unname(kept[place])
            page.set_block_hash(record.key, num_tokens)
            kept[place] = page
        record.pages = kept

    def forget(self, block_hash: BlockHash, pages: Iterable[KVCacheBlock]) -> None:
        """Take their name from pages that will not be filled after all."""
        key = make_block_hash_with_group_id(block_hash, self._group_id)
        for page in pages:
            if page.block_hash == key:
                _unname(page)

    def longest_hit(
        self, block_hashes: Sequence[BlockHash], most_blocks: int
    ) -> tuple[list[KVCacheBlock], int, int]:
        """Return the page list of the longest cached prefix, and its blocks.

        It has an entry for each block and place, the null page where the next query
        sees none.

        Args:
            block_hashes: of the request's full blocks.
            most_blocks: blocks that the prefix may have.

        Returns:
            The list, its blocks, and the blocks that it would have if no window
            lacked a page.
        """
        chain = self._chain(block_hashes, most_blocks)
        boundary = self._boundary(chain)
        found: list[KVCacheBlock] = []
        for block, record in enumerate(chain[:boundary]):
            needs, pages = record.needs, record.pages
            row = [self._null_page] * needs.width(block)
            for place in needs.staying(block):
                row[place] = pages[place]
            for place in needs.reaching(block, boundary):
                row[place] = pages[place]
            found += row
        return found, boundary, len(chain)

    def _chain(
        self, block_hashes: Sequence[BlockHash], most_blocks: int
    ) -> list[CachedBlock]:
        """Records of the first blocks, as far as what stays for good is there."""
        chain: list[CachedBlock] = []
        for block in range(min(most_blocks, len(block_hashes))):
            record = self._records.get(block_hashes[block])
            if record is None or not record.has(record.needs.staying(block)):
                break
            chain.append(record)
        return chain

    def _boundary(self, chain: list[CachedBlock]) -> int:
        """Longest part of the chain whose last blocks fill every window.

        Where a block is missing from a window, every boundary behind it that is
        shorter needs it too: the next to try is the block itself.
        """
        boundary = block = len(chain)
        while block > 0 and boundary - block + 1 < _window_of(chain):
            block -= 1
            record = chain[block]
            if not record.has(record.needs.reaching(block, boundary)):
                boundary = block
        return boundary

    def _sweep(self) -> None:
        """Drop records without pages, once there are twice as many as last time."""
        if len(self._records) < self._most_records:
            return
        self._records = {
            block_hash: record
            for block_hash, record in self._records.items()
            if not record.is_gone()
        }
        self._most_records = max(2 * len(self._records), _FEW_RECORDS)


def _window_of(chain: list[CachedBlock]) -> int:
    return chain[0].needs.window


def _unname(page: KVCacheBlock) -> None:
    page.reset_hash()  # type: ignore[no-untyped-call]
