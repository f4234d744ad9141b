"""Counts what the requests of warps cost: sectors, cache lines, bytes between the caches, banks."""

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

SECTOR, LINE = 32, 128
BANKS, BANK_BYTES = 32, 4
WARP = 32


@dataclass
class Requests:
    """Of one instruction; the bytes of its requests, side by side, would fill `fewest_sectors`."""

    requests: int = 0
    sectors: int = 0
    fewest_sectors: int = 0
    wavefronts: int = 0

    def __add__(self, other: "Requests") -> "Requests":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Requests(*(a + b for a, b in pairs))


def count_unique(values: np.ndarray) -> int:
    return len(np.unique(values))


@dataclass
class Traffic:
    """Of one launch. Keys are positions in the program."""

    loads: dict[int, Requests] = field(default_factory=dict)
    stores: dict[int, Requests] = field(default_factory=dict)
    shared_wavefronts: int = 0
    fewest_shared_wavefronts: int = 0
    # (block, sector) pairs of each request, and whether it stores.
    touched: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def count_global(self, number, address, width, lanes, blocks, is_store: bool) -> None:
        warp = lanes.astype(np.int64) // WARP
        sector = address // SECTOR
        unit = np.unique(warp << 44 | address // width)
        distinct = np.bincount((unit >> 44).astype(int)) * width
        # Lanes whose bytes fill a line are served together: a wavefront per line that they touch.
        together = lanes.astype(np.int64) // max(1, min(WARP, LINE // width))
        of = (self.stores if is_store else self.loads).setdefault(number, Requests())
        of.requests += count_unique(warp)
        of.sectors += count_unique(warp << 44 | sector)
        of.fewest_sectors += int((-(-distinct // SECTOR)).sum())
        of.wavefronts += count_unique(together << 40 | address // LINE)
        pairs = np.unique(blocks.astype(np.int64) << 40 | sector)
        self.touched.append((pairs, np.full(len(pairs), is_store)))

    def count_shared(self, address, width, lanes) -> None:
        """A wavefront serves 128 bytes, one word of each bank."""
        together = lanes.astype(np.int64) // max(1, min(WARP, LINE // width))
        words = address[:, None] // BANK_BYTES + np.arange(max(1, width // BANK_BYTES))
        keys = np.unique(together[:, None] << 40 | words)
        group, bank = keys >> 40, (keys & (1 << 40) - 1) % BANKS
        _, groups = np.unique(group, return_inverse=True)
        per_bank = np.zeros((groups.max() + 1, BANKS), int)
        np.add.at(per_bank, (groups, bank), 1)
        self.shared_wavefronts += int(per_bank.max(1).sum())
        self.fewest_shared_wavefronts += len(per_bank)

    @property
    def total(self) -> Requests:
        return sum([*self.loads.values(), *self.stores.values()], Requests())

    def l2_bytes(self) -> int:
        """Between L1 and L2, if L1 keeps whatever a block has touched until the block ends."""
        loads, stores = (
            [pairs[kind == wanted] for pairs, kind in self.touched] for wanted in (False, True)
        )
        return SECTOR * sum(count_unique(np.concatenate(each)) for each in (loads, stores) if each)

    def dram_bytes(self, l2_bytes: int) -> int:
        """Between L2 and DRAM, for an L2 that drops what was used longest ago; blocks in order.

        A sector that is written goes back when it is dropped, or at the end.
        """
        if not self.touched:
            return 0
        pairs, stores = (np.concatenate(part) for part in zip(*self.touched, strict=True))
        keys = np.unique(pairs * 2 + stores)
        cache: OrderedDict[int, int] = OrderedDict()
        moved = 0
        for key in keys.tolist():
            is_store, sector = key & 1, key >> 1 & (1 << 40) - 1
            if sector in cache:
                cache[sector] |= is_store
                cache.move_to_end(sector)
                continue
            moved += 0 if is_store else SECTOR
            cache[sector] = is_store
            if len(cache) > l2_bytes // SECTOR:
                moved += SECTOR * cache.popitem(last=False)[1]
        return moved + SECTOR * sum(cache.values())
