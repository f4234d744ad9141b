"""Reductions across programs in one launch: the last program of a group combines all their parts.

Every program writes its part to scratch memory, then counts itself with one atomic. The parts are
read in a fixed order, so which program comes last does not change the bits of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEWEST_COUNTERS = 4096
# Per device and stream; all are zero while no kernel of the stream runs, because the last program
# of a group resets its counter.
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, groups: int, stream: int | None = None) -> Tensor:
    """Return int32 zeros, one or more per group of programs of the next launch on `device`.

    A CUDA graph gets its own, because its replays may run on any stream. `stream` is the address of
    the current stream, if it is known and `device` is the current one.
    """
    if device.type == "cuda":
        if stream is None:
            with torch.cuda.device(device):
                return counters(device, groups, torch.cuda.current_stream().cuda_stream)
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(groups, dtype=torch.int32, device=device)
    kept = _counters.get((device, stream))
    if kept is None or kept.numel() < groups:
        size = max(FEWEST_COUNTERS, triton.next_power_of_2(groups))
        kept = _counters[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return kept


@triton.jit
def is_last(counters_ptr, group, programs):
    """Whether this is the last of a group's programs to come here: it sees what all have stored.

    The atomic's acquire and the barrier that hands its result to all threads order later loads
    after those stores, whatever their cache modifier; the callers' ".cg" (read from L2) is a
    precaution. Without counters groups are of one program.
    """
    tl.debug_barrier()  # the atomic, by one thread, must follow the stores of all
    if counters_ptr is None:
        return True
    else:
        earlier = tl.atomic_add(counters_ptr + group, 1, sem="acq_rel", scope="gpu")
        last = earlier == programs - 1
        if last:
            tl.store(counters_ptr + group, 0)
        return last
