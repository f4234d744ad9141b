"""Two gloo processes for a test."""

import torch
import torch.distributed as dist


def on_two_processes(check, tmp_path) -> None:
    """Run `check(rank)` on both; a failure in one is a failure here, with its traceback."""
    torch.multiprocessing.spawn(_start, (check, str(tmp_path / "store")), nprocs=2)


def _start(rank: int, check, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()
