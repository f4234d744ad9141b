"""Which accesses to global memory atomics order, where blocks otherwise run in any order.

A stamp says who accessed memory, and when: its block's barriers so far and the thread's number
from 1 on. 0 stands for nobody.
"""

from collections import defaultdict

import numpy as np

THREADS = 1 << 40


def stamps_of(barriers: np.ndarray, threads: np.ndarray) -> np.ndarray:
    return barriers * THREADS + threads + 1


def thread_of(stamps: np.ndarray) -> np.ndarray:
    return stamps % THREADS - 1


def _is_covered(stamps: np.ndarray, atomic: np.ndarray) -> np.ndarray:
    """Whether accesses of an atomic's block come before it: by its thread, or before a barrier."""
    is_own = thread_of(stamps) == thread_of(atomic)
    return np.where(is_own, stamps <= atomic, stamps // THREADS < atomic // THREADS)


def _is_after(stamps: np.ndarray, atomic: int) -> np.ndarray:
    is_own = thread_of(stamps) == thread_of(atomic)
    return np.where(is_own, stamps >= atomic, stamps // THREADS > atomic // THREADS)


class Order:
    """Atomics that acquire and release, by the address that they change.

    What a block does after one comes after what blocks did before theirs, if that was earlier.
    """

    def __init__(self, threads_per_block: int) -> None:
        self.threads_per_block = threads_per_block
        self.clear()

    def clear(self) -> None:
        self.released: dict[int, list[int]] = defaultdict(list)  # stamps by address
        # By block: the stamp of each atomic, the stamps at its address, and how many it follows.
        self.acquired: dict[int, list[tuple[int, list[int], int]]] = defaultdict(list)

    def _block(self, stamps: np.ndarray) -> np.ndarray:
        return np.where(stamps == 0, -1, thread_of(stamps) // self.threads_per_block)

    def add(self, address: int, stamp: int) -> None:
        released = self.released[address]
        released.append(stamp)
        self.acquired[int(self._block(stamp))].append((stamp, released, len(released)))

    def has_barrier_between(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether accesses of these stamps are of one block, with a barrier between them."""
        is_one = self._block(some) == self._block(others)
        return is_one & (some // THREADS != others // THREADS)

    def is_before(self, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
        """Which accesses of the first stamps come before those of the second, pair by pair."""
        earlier_block, later_block = self._block(earlier), self._block(later)
        result = np.zeros(earlier.shape, bool)
        others = (earlier != 0) & (thread_of(earlier) != thread_of(later))
        for block in np.unique(later_block[others]):
            for atomic, released, count in self.acquired.get(int(block), ()):
                rows = np.nonzero(others & (later_block == block) & _is_after(later, atomic))
                last_of = {int(self._block(stamp)): stamp for stamp in released[:count]}
                blocks = np.array(sorted(last_of))
                at = np.minimum(np.searchsorted(blocks, earlier_block[rows]), len(blocks) - 1)
                release = np.array([last_of[each] for each in blocks.tolist()])[at]
                is_found = blocks[at] == earlier_block[rows]
                result[rows] |= is_found & _is_covered(earlier[rows], release)
        return result
