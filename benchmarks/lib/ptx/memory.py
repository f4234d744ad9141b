"""Global and shared memory that notice what a GPU would corrupt in silence."""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .order import Order, thread_of

NOBODY = -1


class Fault(Exception):
    """What a GPU would trap on, corrupt in silence, or leave undefined."""


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The whole storage behind a tensor, without a copy."""
    storage = tensor.untyped_storage()
    array = ctypes.c_uint8 * storage.nbytes()
    return np.ctypeslib.as_array(array.from_address(storage.data_ptr()))


@dataclass
class Buffer:
    """The storage of some of a launch's tensors; flags are per `unit` bytes, one element."""

    name: str
    start: int
    data: np.ndarray
    unit: int
    allowed: np.ndarray
    known: np.ndarray
    writer: np.ndarray  # stamps (order.py)
    is_stored_to: bool = False
    # Stamps, elements, position of the instruction.
    reads: list[tuple[np.ndarray, np.ndarray, int]] = field(default_factory=list)
    replaced: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # vectors, bytes
    # (thread, element) pairs whose reads give garbage.
    poisoned: np.ndarray | None = None
    expected: np.ndarray | None = None  # data that must come out all the same

    def elements(self, local: np.ndarray, width: int) -> np.ndarray:
        """The elements that each lane touches, [lanes, elements per access]."""
        return local[:, None] // self.unit + np.arange(max(1, width // self.unit))

    def vectors(self, width: int) -> np.ndarray:
        return self.data[: self.data.size // width * width].view(f"V{width}")

    def races(self, order: Order) -> np.ndarray:
        """(thread, element, position) of reads by this thread of what another one wrote."""
        found = [np.empty((0, 3), np.int64)]
        for stamps, elements, position in self.reads:
            writer, threads = self.writer[elements], thread_of(stamps)
            is_ordered = order.has_barrier_between(writer, stamps[:, None])
            is_other = (writer != 0) & (thread_of(writer) != threads[:, None])
            lanes, columns = np.nonzero(is_other & ~is_ordered)
            places = np.full(len(lanes), position)
            found.append(np.stack([threads[lanes], elements[lanes, columns], places], 1))
        return np.unique(np.concatenate(found), axis=0)

    def rewind(self) -> None:
        """Undo all stores."""
        for places, before in reversed(self.replaced):
            self.vectors(before.dtype.itemsize)[places] = before
        self.writer[:] = 0
        self.reads, self.replaced = [], []


class GlobalMemory:
    """The tensors of one launch at made-up addresses, with gaps between them.

    An access must lie inside the elements of a tensor, not only inside its storage; tensors that
    share a storage count as one. What is read must have been written. No element is written twice,
    nor written by one thread and read by another, unless a barrier of their block or an atomic
    says which comes first.
    """

    GAP = 1 << 20
    ALIGNMENT = 256

    def __init__(self, threads_per_block: int) -> None:
        self.order = Order(threads_per_block)
        self.buffers: list[Buffer] = []
        self._of_storage: dict[int, Buffer] = {}
        self._next = 1 << 32

    def add(self, tensor: Tensor, name: str, known: np.ndarray | None) -> int:
        """The address of a tensor's first element.

        `known` says which elements of its storage were written, and is kept up to date; None: all
        of the tensor's.
        """
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() == 0:
            return self._next
        if key not in self._of_storage:
            self._of_storage[key] = self._buffer(tensor, name, key, known)
        buffer = self._of_storage[key]
        if buffer.unit != tensor.itemsize:
            raise NotImplementedError("tensors of several dtypes in one storage")
        index = tensor.storage_offset()
        for flags in (buffer.allowed, *(() if known is not None else (buffer.known,))):
            view = torch.from_numpy(flags).as_strided(tensor.shape, tensor.stride(), index)
            view.fill_(True)
        return buffer.start + index * tensor.itemsize

    def _buffer(self, tensor: Tensor, name: str, key: int, known: np.ndarray | None) -> Buffer:
        data, unit = _bytes_of(tensor), tensor.itemsize
        # Storages start as on a GPU; Triton sees whether 16 divides the CPU's address.
        start = -(-self._next // self.ALIGNMENT) * self.ALIGNMENT + key % 16
        self._next = start + data.size + self.GAP
        count = -(-data.size // unit)
        allowed, writer = np.zeros(count, bool), np.zeros(count, np.int64)
        known = np.zeros(count, bool) if known is None else known
        self.buffers.append(Buffer(name, start, data, unit, allowed, known, writer))
        return self.buffers[-1]

    def _split(self, address: np.ndarray):
        """(buffer, which lanes) of an access; mostly all lanes touch the same tensor."""
        # A tensor's part of the address space begins in the middle of the gap before it.
        starts = np.array([buffer.start - self.GAP // 2 for buffer in self.buffers], np.int64)
        which = np.searchsorted(starts, address, "right") - 1
        for index in np.unique(which):
            yield self.buffers[max(index, 0)], np.nonzero(which == index)[0]

    def _check(self, buffer: Buffer, local: np.ndarray, width: int) -> np.ndarray:
        outside = (local < 0) | (local + width > buffer.data.size)
        if outside.any():
            raise Fault(
                f"out of bounds: {width} bytes at {buffer.name} {local[outside][0]:+} of "
                f"{buffer.data.size} bytes, {np.count_nonzero(outside)} lanes"
            )
        elements = buffer.elements(local, width)
        outside = ~buffer.allowed[elements].all(1)
        if outside.any():
            raise Fault(
                f"outside the tensor's elements: {width} bytes at {buffer.name} "
                f"{local[outside][0]:+}, {np.count_nonzero(outside)} lanes"
            )
        return elements

    def load(self, address: np.ndarray, width: int, stamps: np.ndarray, position: int):
        """Bytes, [lanes, width], for the instruction at `position`."""
        result = np.empty((len(address), width), np.uint8)
        for buffer, lanes in self._split(address):
            local = address[lanes] - buffer.start
            elements = self._check(buffer, local, width)
            if not buffer.known[elements].all():
                bad = elements[~buffer.known[elements]][0] * buffer.unit
                raise Fault(f"unwritten memory is read: {buffer.name} + {bad}")
            self._note_read(buffer, stamps[lanes], elements, position)
            result[lanes] = buffer.vectors(width)[local // width].view(np.uint8).reshape(-1, width)
            if buffer.poisoned is not None:
                pairs = thread_of(stamps[lanes, None]) << 32 | elements
                result[lanes[np.isin(pairs, buffer.poisoned).any(1)]] = 0xFF
        return result

    def _note_read(self, buffer: Buffer, stamps, elements: np.ndarray, position: int) -> None:
        """Keep for `races` what no atomic has ordered."""
        if self.order.acquired:
            pairs = np.broadcast_to(stamps[:, None], elements.shape)
            is_open = ~self.order.is_before(buffer.writer[elements], pairs)
            stamps, elements = pairs[is_open], elements[is_open][:, None]
        buffer.reads.append((stamps, elements, position))

    def add_atomically(
        self, address: int, value: np.uint32, stamp: int, is_ordering: bool
    ) -> np.uint32:
        """Add to the number at `address` and return what it was."""
        ((buffer, _),) = self._split(np.array([address]))
        local = np.array([address - buffer.start])
        elements = self._check(buffer, local, value.itemsize)
        self._check_order(buffer.writer[elements], stamp, buffer)
        if is_ordering:
            self.order.add(address, stamp)
        vectors, places = buffer.vectors(value.itemsize), local // value.itemsize
        before = vectors[places]
        buffer.replaced.append((places, before))
        buffer.is_stored_to = True
        vectors[places] = (before.view(value.dtype) + value).view(vectors.dtype)
        return before.view(value.dtype)[0]

    def _check_order(self, earlier: np.ndarray, stamp: int, buffer: Buffer) -> None:
        """Raise unless accesses to an element that atomics change come before another."""
        later = np.full(earlier.shape, stamp)
        is_ordered = thread_of(earlier) == thread_of(later)
        is_ordered |= (earlier == 0) | self.order.is_before(earlier, later)
        if not is_ordered.all():
            raise Fault(f"an atomic on {buffer.name} and a store in no order")

    def store(self, address: np.ndarray, data: np.ndarray, stamps: np.ndarray) -> None:
        width = data.shape[1]
        for counter in self.order.released.keys() & set(address.tolist()):
            for buffer, lanes in self._split(address):
                atomics = np.array(self.order.released[counter])
                for stamp in stamps[lanes[address[lanes] == counter]]:
                    self._check_order(atomics, stamp, buffer)
        for buffer, lanes in self._split(address):
            local, owner = address[lanes] - buffer.start, stamps[lanes, None]
            elements = self._check(buffer, local, width)
            before, buffer.writer[elements] = buffer.writer[elements], owner
            if before.any() or (buffer.writer[elements] != owner).any():
                raise Fault(f"an element of {buffer.name} is written twice")
            buffer.known[elements] = buffer.is_stored_to = True
            vectors, places = buffer.vectors(width), local // width
            buffer.replaced.append((places, vectors[places]))
            vectors[places] = data[lanes].view(vectors.dtype).ravel()

    def poison_races(self) -> int | None:
        """If threads read what others wrote: undo all stores, and let those reads give garbage.

        Returns the position of such a read. Some do no harm: lanes past the end read the last
        element again, and replicated lanes what one of them writes. Their results are not used, so
        the same launch must now compute the same bits.
        """
        self.order.clear()
        stored = [buffer for buffer in self.buffers if buffer.is_stored_to]
        races = [buffer.races(self.order) for buffer in stored]
        if not any(map(len, races)):
            return None
        for buffer, found in zip(stored, races, strict=True):
            buffer.expected = buffer.data.copy()
            buffer.rewind()
            buffer.poisoned = found[:, 0] << 32 | found[:, 1]
        return next(int(found[0, 2]) for found in races if len(found))

    def check_results(self) -> None:
        for buffer in self.buffers:
            if buffer.expected is not None and (buffer.data != buffer.expected).any():
                raise Fault(f"{buffer.name} is read by one thread and written by another")


class NoMemory:
    """Addresses for tensors that need no memory, such as meta tensors: only traffic is counted."""

    def __init__(self) -> None:
        self._next = 1 << 32

    def add(self, tensor: Tensor, name: str, known: np.ndarray | None) -> int:
        start, storage = self._next, tensor.untyped_storage().nbytes()
        self._next += -(-storage // GlobalMemory.ALIGNMENT) * GlobalMemory.ALIGNMENT
        return start + tensor.storage_offset() * tensor.itemsize

    def load(self, address: np.ndarray, width: int, stamps: np.ndarray, position: int):
        return np.zeros((len(address), width), np.uint8)

    def store(self, address: np.ndarray, data: np.ndarray, stamps: np.ndarray) -> None:
        pass

    def add_atomically(
        self, address: int, value: np.uint32, stamp: int, is_ordering: bool
    ) -> np.uint32:
        return np.uint32(0)

    def poison_races(self) -> None:
        return None


class SharedMemory:
    """The shared memory of the blocks that run together, with the accesses since a barrier.

    A stamp says when and by whom a byte was last touched: barriers that came before, thread.
    """

    BARRIERS = 1 << 16

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.data = np.zeros((blocks, max(size, 1)), np.uint8)
        self.known = np.zeros(self.data.shape, bool)
        self.writer = np.full(self.data.shape, NOBODY, np.int64)
        # The lowest and the highest thread that read a byte since the last barrier.
        self.readers = np.full((2, *self.data.shape), NOBODY, np.int64)
        self.size, self.threads = size, threads
        self.barriers = np.zeros(blocks, np.int64)

    def barrier(self, mask: np.ndarray) -> None:
        per_block = mask.reshape(len(self.barriers), -1)
        some, every = per_block.any(1), per_block.all(1)
        if (some != every).any():
            raise Fault("bar.sync that not all threads of a block reach together")
        self.barriers[every] += 1

    def _place(self, address: np.ndarray, width: int, lanes: np.ndarray):
        if (address < 0).any() or (address + width > self.size).any():
            raise Fault(f"out of bounds in shared memory: {width} bytes at {address.max()}")
        block = lanes // self.threads
        stamp = self.barriers[block] * self.BARRIERS + lanes % self.threads
        cells = address[:, None] + np.arange(width)
        return block[:, None], cells, np.broadcast_to(stamp[:, None], cells.shape)

    def _clashes(self, other: np.ndarray, stamp: np.ndarray) -> np.ndarray:
        """Whether another thread made an earlier access since the last barrier."""
        is_recent = (other >= 0) & (other // self.BARRIERS == stamp // self.BARRIERS)
        return is_recent & (other != stamp)

    def load(self, address: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        block, cells, stamp = self._place(address, width, lanes)
        if not self.known[block, cells].all():
            raise Fault("unwritten shared memory is read")
        if self._clashes(self.writer[block, cells], stamp).any():
            raise Fault("race: shared memory is read that another thread writes")
        lowest, highest = self.readers
        stale = lowest[block, cells] // self.BARRIERS != stamp // self.BARRIERS
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

    def await_copy(self, address: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Bytes that an asynchronous copy will write: nobody may read them before it is done."""
        if self.overwrites(address, width, lanes).any():
            raise Fault("race: cp.async overwrites what another thread reads")
        block, cells, _ = self._place(address, width, lanes)
        self.known[block, cells] = False
