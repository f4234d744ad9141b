"""Global and shared memory that notice what a GPU would corrupt in silence."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

WARP = 32
NOBODY = -1


class Fault(Exception):
    """What a GPU would trap on, corrupt in silence, or leave undefined."""


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The whole storage behind a tensor, without a copy."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return whole.numpy()


@dataclass
class Buffer:
    """The storage of some of a launch's tensors; flags are per `unit` bytes, one element."""

    name: str
    start: int
    data: np.ndarray
    unit: int
    allowed: np.ndarray
    known: np.ndarray
    writer: np.ndarray  # the thread's number from 1 on, or 0
    is_stored_to: bool = False
    reads: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # threads, elements
    replaced: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # vectors, bytes
    # (thread, element) pairs whose reads give garbage.
    poisoned: np.ndarray | None = None

    def elements(self, local: np.ndarray, width: int) -> np.ndarray:
        """The elements that each lane touches, [lanes, elements per access]."""
        return local[:, None] // self.unit + np.arange(max(1, width // self.unit))

    def vectors(self, width: int) -> np.ndarray:
        return self.data[: self.data.size // width * width].view(f"V{width}")

    def races(self) -> np.ndarray:
        """(thread, element) pairs that were read by this thread and written by another one."""
        found = [np.empty((0, 2), np.int64)]
        for threads, elements in self.reads:
            writer = self.writer[elements]
            lanes, columns = np.nonzero((writer != 0) & (writer != threads[:, None] + 1))
            found.append(np.stack([threads[lanes], elements[lanes, columns]], 1))
        return np.unique(np.concatenate(found), axis=0)

    def rewind(self) -> None:
        """Undo all stores."""
        for places, before in reversed(self.replaced):
            self.vectors(before.dtype.itemsize)[places] = before
        self.writer[:] = 0
        self.reads, self.replaced = [], []


class GlobalMemory:
    """The tensors of one launch at made-up addresses, with gaps between them.

    An access must be naturally aligned and lie inside the elements of a tensor, not only inside its
    storage. What is read must have been written. No element is written twice, nor by one thread and
    read by another: between the blocks of a grid nothing says which comes first.
    """

    GAP = 1 << 20
    ALIGNMENT = 256

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._of_storage: dict[int, Buffer] = {}
        self._next = 1 << 32

    def add(self, tensor: Tensor, is_written: bool) -> int:
        """The address of a tensor's first element, aligned as the real one is."""
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() == 0:
            return self._next
        if key not in self._of_storage:
            self._of_storage[key] = self._buffer(tensor, key)
        buffer = self._of_storage[key]
        if buffer.unit != tensor.itemsize:
            raise NotImplementedError("tensors of several dtypes in one storage")
        index = tensor.storage_offset()
        for flags, value in ((buffer.allowed, True), (buffer.known, is_written)):
            if value:
                view = torch.from_numpy(flags).as_strided(tensor.shape, tensor.stride(), index)
                view.fill_(True)
        return buffer.start + index * tensor.itemsize

    def _buffer(self, tensor: Tensor, key: int) -> Buffer:
        data, unit = _bytes_of(tensor), tensor.itemsize
        start = -(-self._next // self.ALIGNMENT) * self.ALIGNMENT + key % self.ALIGNMENT
        self._next = start + data.size + self.GAP
        count = -(-data.size // unit)
        allowed, known = (np.zeros(count, bool) for _ in range(2))
        writer = np.zeros(count, np.int32)
        self.buffers.append(
            Buffer(f"argument {len(self.buffers)}", start, data, unit, allowed, known, writer)
        )
        return self.buffers[-1]

    def _split(self, address: np.ndarray):
        """(buffer, which lanes) of an access; mostly all lanes touch the same tensor."""
        starts = np.array([buffer.start for buffer in self.buffers], np.int64)
        which = np.searchsorted(starts, address, "right") - 1
        for index in np.unique(which):
            if index < 0:
                raise Fault("out of bounds: before all tensors")
            yield self.buffers[index], np.nonzero(which == index)[0]

    def _check(self, buffer: Buffer, local: np.ndarray, width: int) -> np.ndarray:
        past = local + width > buffer.data.size
        if past.any():
            raise Fault(
                f"out of bounds: {width} bytes at {buffer.name} + {local[past][0]} of "
                f"{buffer.data.size}, {np.count_nonzero(past)} lanes"
            )
        elements = buffer.elements(local, width)
        outside = ~buffer.allowed[elements].all(1)
        if outside.any():
            raise Fault(
                f"outside the tensor's elements: {width} bytes at {buffer.name} + "
                f"{local[outside][0]}, {np.count_nonzero(outside)} lanes"
            )
        return elements

    def load(self, address: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """Bytes, [lanes, width]."""
        result = np.empty((len(address), width), np.uint8)
        for buffer, lanes in self._split(address):
            local = address[lanes] - buffer.start
            elements = self._check(buffer, local, width)
            if not buffer.known[elements].all():
                bad = elements[~buffer.known[elements]][0] * buffer.unit
                raise Fault(f"unwritten memory is read: {buffer.name} + {bad}")
            buffer.reads.append((threads[lanes], elements))
            result[lanes] = buffer.vectors(width)[local // width].view(np.uint8).reshape(-1, width)
            if buffer.poisoned is not None:
                pairs = threads[lanes, None].astype(np.int64) << 32 | elements
                result[lanes[np.isin(pairs, buffer.poisoned).any(1)]] = 0xFF
        return result

    def store(self, address: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        width = data.shape[1]
        for buffer, lanes in self._split(address):
            local, owner = address[lanes] - buffer.start, threads[lanes, None] + 1
            elements = self._check(buffer, local, width)
            before, buffer.writer[elements] = buffer.writer[elements], owner
            if before.any() or (buffer.writer[elements] != owner).any():
                raise Fault(f"an element of {buffer.name} is written twice")
            buffer.known[elements] = buffer.is_stored_to = True
            vectors, places = buffer.vectors(width), local // width
            buffer.replaced.append((places, vectors[places]))
            vectors[places] = data[lanes].view(vectors.dtype).ravel()

    def is_stored_to(self, tensor: Tensor) -> bool:
        buffer = self._of_storage.get(tensor.untyped_storage().data_ptr())
        return buffer is not None and buffer.is_stored_to

    def poison_races(self) -> list[np.ndarray] | None:
        """If threads read what others wrote: undo all stores, and let those reads give garbage.

        Returns what the tensors held. Some such reads do no harm: lanes past the end read the last
        element again, and replicated lanes what one of them writes. Their results are not used, so
        the same launch must now compute the same bits.
        """
        races = [buffer.races() for buffer in self.buffers if buffer.is_stored_to]
        if not any(map(len, races)):
            return None
        stored = [buffer for buffer in self.buffers if buffer.is_stored_to]
        results = [buffer.data.copy() for buffer in stored]
        for buffer, pairs in zip(stored, races, strict=True):
            buffer.rewind()
            buffer.poisoned = pairs[:, 0] << 32 | pairs[:, 1]
        return results

    def check_results(self, expected: list[np.ndarray]) -> None:
        stored = [buffer for buffer in self.buffers if buffer.is_stored_to]
        for buffer, data in zip(stored, expected, strict=True):
            if (buffer.data != data).any():
                raise Fault(f"{buffer.name} is read by one thread and written by another")


class NoMemory:
    """Addresses for tensors that need no memory, such as meta tensors: only traffic is counted."""

    def __init__(self) -> None:
        self._next = 1 << 32

    def add(self, tensor: Tensor, is_written: bool) -> int:
        start, storage = self._next, tensor.untyped_storage().nbytes()
        self._next += -(-storage // GlobalMemory.ALIGNMENT) * GlobalMemory.ALIGNMENT
        return start + tensor.storage_offset() * tensor.itemsize

    def load(self, address: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        return np.zeros((len(address), width), np.uint8)

    def store(self, address: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        pass

    def poison_races(self) -> None:
        return None


class SharedMemory:
    """The shared memory of the blocks that run together, with the accesses since a barrier.

    A stamp says when and by whom a byte was last touched: barriers of the block that came before,
    those of the warp, the thread.
    """

    BLOCK_BARRIERS, WARP_BARRIERS = 1 << 40, 1 << 16

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.data = np.zeros((blocks, max(size, 1)), np.uint8)
        self.known = np.zeros(self.data.shape, bool)
        self.writer = np.full(self.data.shape, NOBODY, np.int64)
        # The lowest and the highest thread that read a byte since the last barrier.
        self.readers = np.full((2, *self.data.shape), NOBODY, np.int64)
        self.size, self.threads = size, threads
        self.barriers = np.zeros(blocks, np.int64)
        self.warp_barriers = np.zeros(blocks * threads // WARP, np.int64)

    def barrier(self, mask: np.ndarray) -> None:
        per_block = mask.reshape(len(self.barriers), -1)
        some, every = per_block.any(1), per_block.all(1)
        if (some != every).any():
            raise Fault("bar.sync that not all threads of a block reach together")
        self.barriers[every] += 1

    def warp_barrier(self, lanes: np.ndarray) -> None:
        self.warp_barriers[np.unique(lanes // WARP)] += 1

    def _place(self, address: np.ndarray, width: int, lanes: np.ndarray):
        if (address < 0).any() or (address + width > self.size).any():
            raise Fault(f"out of bounds in shared memory: {width} bytes at {address.max()}")
        block = lanes // self.threads
        stamp = self.barriers[block] * self.BLOCK_BARRIERS
        stamp += self.warp_barriers[lanes // WARP] * self.WARP_BARRIERS + lanes % self.threads
        cells = address[:, None] + np.arange(width)
        return block[:, None], cells, np.broadcast_to(stamp[:, None], cells.shape)

    def _clashes(self, other: np.ndarray, stamp: np.ndarray) -> np.ndarray:
        """Whether an earlier access, by another thread, is not ordered before this one."""
        thread, other_thread = stamp % self.WARP_BARRIERS, other % self.WARP_BARRIERS
        is_recent = (other >= 0) & (other // self.BLOCK_BARRIERS == stamp // self.BLOCK_BARRIERS)
        in_warp = thread // WARP == other_thread // WARP
        is_ordered = in_warp & (other // self.WARP_BARRIERS < stamp // self.WARP_BARRIERS)
        return is_recent & (other_thread != thread) & ~is_ordered

    def load(self, address: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        block, cells, stamp = self._place(address, width, lanes)
        if not self.known[block, cells].all():
            raise Fault("unwritten shared memory is read")
        if self._clashes(self.writer[block, cells], stamp).any():
            raise Fault("race: shared memory is read that another thread writes")
        lowest, highest = self.readers
        stale = lowest[block, cells] // self.BLOCK_BARRIERS != stamp // self.BLOCK_BARRIERS
        rows = np.broadcast_to(block, cells.shape)[stale]
        lowest[rows, cells[stale]], highest[rows, cells[stale]] = 1 << 62, NOBODY
        np.minimum.at(lowest, (block, cells), stamp)
        np.maximum.at(highest, (block, cells), stamp)
        return self.data[block, cells]

    def store(self, address: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        """Threads may write the value that is there: Triton's replicated results do."""
        block, cells, stamp = self._place(address, data.shape[1], lanes)
        before = self.writer[block, cells]
        is_changed = self.data[block, cells] != data
        bad = self._clashes(before, stamp) & is_changed
        self.writer[block, cells], self.data[block, cells] = stamp, data
        is_lost = self.data[block, cells] != data
        bad |= self._clashes(self.writer[block, cells], stamp) & is_lost
        bad |= self.overwrites(address, data.shape[1], lanes) & is_changed
        if bad.any():
            raise Fault("race: shared memory is written that another thread reads or writes")
        self.known[block, cells] = True

    def overwrites(self, address: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        """Which bytes other threads have read since the last barrier."""
        block, cells, stamp = self._place(address, width, lanes)
        return np.any([self._clashes(each[block, cells], stamp) for each in self.readers], 0)
