"""Two gloo processes for a test."""

import torch
import torch.distributed as dist


def on_two_processes(tmp_path, *checks) -> None:
    """Run each `check(rank)` on both; a failure in one is a failure here, with its traceback."""
    torch.multiprocessing.spawn(_start, (checks, str(tmp_path / "store")), nprocs=2)


def _start(rank: int, checks, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for check in checks:
            torch.manual_seed(0)
            check(rank)
    finally:
        dist.destroy_process_group()
