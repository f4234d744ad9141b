"""Executes kernels as Triton compiles them, without a GPU: their PTX, on CPU tensors, checked.

program     parses PTX
arithmetic  what instructions compute
accesses    what instructions do to memory
memory      global and shared memory that notice faults
order       which accesses atomics order
machine     runs a grid of blocks
traffic     sectors, cache lines and bytes that the accesses cost
driver      makes Triton compile and launch for it: `emulated_gpu`
"""

from .driver import EmulatedGpu, count_traffic, emulated_gpu
from .memory import Fault

__all__ = ["EmulatedGpu", "Fault", "count_traffic", "emulated_gpu"]
