"""Launches on the stub driver, steps without convolutions, and the tables of both."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from helpers import needs_emulation

from benchmarks.lib import host, stub_driver, tables
from benchmarks.lib.operators import launches
from benchmarks.lib.step import Step
from revbifpn_kernels import create_model, resample_add

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_every_op_with_a_gpu_kernel_is_found():
    ops = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
           if name.startswith("revbifpn::")}  # fmt: skip
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert set(host.gpu_implementations()) == {op for op in ops if has(f"revbifpn::{op}", "CUDA")}


@needs_emulation
@needs_compiler
def test_launches_are_counted_and_repeated_by_tritons_launcher():
    x, source = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 4, 4)
    with host.ops_launch_on_stub() as count, torch.no_grad():
        with host.recorded_launches() as repeats:
            launches(lambda: resample_add(x, [source]), "cpu")
        assert len(repeats) == 1
        before = count()
        for call in (*repeats, *[lambda: resample_add(x, [source])] * 3):
            call()
        assert count() == before + 4
    assert torch.equal(resample_add(x, [source]), torch.ones_like(x))


@needs_compiler
def test_a_stub_driver_that_another_process_makes_meanwhile_stays_whole(tmp_path, monkeypatch):
    library, link = tmp_path / "libcuda.so.1", tmp_path / "libcuda.so"
    run = subprocess.run

    def compiled(command, **options):
        library.write_text("of another process")
        link.symlink_to(library.name)
        run(command, **options)
        assert library.read_text() == "of another process"

    monkeypatch.setattr(subprocess, "run", compiled)
    monkeypatch.setattr(stub_driver, "FOLDER", tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: path)
    for _ in range(2):  # the second time it is there
        assert stub_driver._library.__wrapped__() == str(library)
    assert link.resolve() == library and library.read_bytes().startswith(b"\x7fELF")
    assert {*tmp_path.iterdir()} == {library, link}


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "modules"])
def test_a_step_without_convolutions(is_fused):
    step = Step(create_model("revbifpn_s0", num_classes=2), torch.zeros(2, 3, 64, 64))
    with host.convolutions_stubbed(is_fused=is_fused):
        step.forward().backward()
    shapes = {name: p.shape for name, p in step.net.named_parameters() if p.grad is None}
    assert not shapes


def row(op, provider, mode, ms, **more):
    conditions = {"device": "Some CPU", "torch": "2.12.0", "commit": "abc", "date": "2026-01-02"}
    return conditions | {"op": op, "provider": provider, "mode": mode, "ms_p50": ms} | more


def test_tables_compare_with_the_launcher_and_with_modules():
    rows = [
        row("norm_act_grad", "ours", "launch", "0.030", launches="2"),
        row("norm_act_grad", "launcher", "launch", "0.006", launches="2"),
        row("s0", "fused", "step", "50", operators="7"),
        row("s0", "modules", "step", "100", operators="9"),
        row("resample_add", "ours", "cpu", "0.01", shape="1x8x4x4"),
        row("resample_add", "torch", "cpu", "0.04", shape="1x8x4x4"),
        row("s0", "reversible", "count", "", launches="12", operators="6"),
    ]
    page = [line.replace(" ", "") for line in tables.host_page(rows).splitlines()]
    wanted = ["|`norm_act_grad`|2|30.0|12.0|", "|s0|50.0|100.0|0.50|7|9|",
              "|1×8×4×4|10.0|40.0|0.25|", "|s0|reversible|12|6|"]  # fmt: skip
    assert [line for line in page if line in wanted] == [wanted[0], wanted[1], wanted[3], wanted[2]]
