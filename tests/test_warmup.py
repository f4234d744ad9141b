"""`python -m revbifpn_kernels warmup`: a step finds the kernels that it compiles in the cache."""

import pytest
import torch
import torch.distributed as dist
from helpers import IS_INTERPRETED
from tiny import tiny
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainings import TINY
from triton import knobs

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels import convert_sync_batchnorm, warmup
from revbifpn_kernels.__main__ import main
from revbifpn_kernels.recipes.classify import networks
from revbifpn_kernels.recipes.classify.options import parse
from revbifpn_kernels.recipes.run.processes import World

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")
SM_90 = warmup.target_of("sm_90")


def calls(**arguments) -> list[warmup.OpCall]:
    return warmup.calls_of_step(tiny(), (2, 3, 64, 64), **arguments)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Lists what is in Triton's cache, which starts empty."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return lambda: sorted(path.name for path in tmp_path.iterdir())


def test_a_call_finds_its_kernels_in_the_cache(cached):
    call = next(call for call in calls() if call.op == "norm_act_gates")
    for number, _ in enumerate(call.launches()):
        warmup._compile(call, number, SM_90)
    before = cached()
    is_spec = lambda argument: isinstance(argument, warmup.Spec)  # noqa: E731
    given = [each.on("cpu") if is_spec(each) else each for each in call.arguments]
    with emulated_gpu():
        getattr(torch.ops.revbifpn, call.op).default.redispatch(warmup._CUDA, *given)
    assert before and cached() == before


def test_steps_differ_in_their_kernels():
    steps = calls(), calls(autocast=torch.bfloat16), calls(channels_last=True)
    fp32, bf16, channels_last = (
        {warmup.kernel_key(*call.launches()[k]) for call, k in warmup.distinct_launches(step)}
        for step in steps
    )
    assert len(fp32) > 10 and not fp32 <= bf16 and not fp32 <= channels_last


def test_of_synchronised_norms():
    """Which run other kernels, and whose processes are not asked."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        net = convert_sync_batchnorm(tiny())
        ops = {call.op for call in warmup.calls_of_step(net, (2, 3, 64, 64))}
    finally:
        dist.destroy_process_group()
    assert {"norm_act_sums", "norm_act_input_grad"} <= ops and "norm_act_grad" not in ops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target=9.0"], "expected the name of a GPU, such as sm_90 or gfx942, got '9.0'"),
        (["--batch=0"], "--batch must be at least 1, got 0"),
        (["--size=31"], "--side must be at least 32 pixels, got 31"),
        pytest.param([], "found no GPU to compile for", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="has a GPU")),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_line(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["warmup", "revbifpn_s0", *options])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_and_the_training_compile_on_all_cores(cached, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # of the processes that compile
    options = "--size=64 --batch=2 --dtype=bf16 --target=sm_90".split()
    assert main(["warmup", "revbifpn_s0", *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("revbifpn_s0, 2×3×64×64, bf16: ") and " kernels for sm_90 ready" in said
    assert len(cached()) >= int(said.split()[3])
    run = parse(TINY)
    world = World(0, 1, torch.device("cuda", 0))
    line = networks.compile_kernels(run, world, networks.config(run, 10), 2, 64, "sm_90")
    assert " kernels for sm_90 ready after " in line
