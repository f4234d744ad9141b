"""The benchmarks of whole networks, on cases small enough for a test."""

import dataclasses

import pytest
import torch
from tiny import TWO_LEVELS, tiny
from torch import nn

from benchmarks import bench_memory, bench_step, step_report
from benchmarks.lib import counts, harness, operators, rivals
from benchmarks.lib.memory import held_and_peak
from benchmarks.lib.rivals import NETWORKS, Network
from benchmarks.lib.roofline import Peaks, Work, work_of
from benchmarks.lib.training import Step
from revbifpn_kernels import MBConv, training_memory

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20


def conv_net():
    """Neither norms nor linear layers, so that all that is kept is maps."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), nn.Conv2d(8, 4, 1), nn.Hardswish()
    )


def options(tmp_path, *arguments):
    shared = ["--device", "cpu", "--seconds", "0.1", "--output", str(tmp_path / "rows.csv")]
    return [*shared, "--batch", "2", "--side", "64", "--rivals", *arguments]


@pytest.fixture
def small(monkeypatch):
    """A network in the table that takes no time."""
    network = Network(lambda: tiny(reversible=False, **TWO_LEVELS), 64, "RevBiFPN")
    monkeypatch.setitem(NETWORKS, "tiny", network)
    return "tiny"


def test_the_table_has_all_networks():
    assert {f"efficientnet_b{k}" for k in range(8)} <= set(NETWORKS)
    assert {f"revbifpn_s{k}" for k in range(7)} <= set(NETWORKS)
    assert NETWORKS["efficientnet_b7"].side == 600 and NETWORKS["revbifpn_s6"].side == 352


@pytest.mark.parametrize("name", ["efficientnet_b0", "hrnet_w18", "bifpn_b0"])
def test_rivals_train_on_fake_tensors(name):
    memory = training_memory(counts.fake_network(name), (2, 3, 64, 64))
    assert 0 < memory.held <= memory.peak


def test_nothing_is_dropped():
    drops = (nn.Dropout, nn.Dropout2d)
    for name in ("revbifpn_s6", "efficientnet_b7"):
        net = counts.fake_network(name)
        assert all(m.p == 0 for m in net.modules() if isinstance(m, drops))
        assert not any("DropPath" in type(m).__name__ for m in net.modules())


def test_providers_have_the_same_weights_and_gradients(small):
    image = torch.randn(2, 3, 64, 64)
    gradients = {}
    for name, net in rivals.providers_of(small, rivals.EAGER).items():
        Step(net, image)()
        gradients[name] = rivals.gradients(net)
    for name in ("reversible", "checkpoint"):
        torch.testing.assert_close(gradients[name], gradients["stored"], rtol=1e-3, atol=1e-5)


def test_slope():
    net = conv_net()
    found = counts.slope(net, (110, 1200), (130, 1400))  # held, peak of two; of four
    assert (found.held, found.peak) == (10, 100)
    parameters = sum(p.numel() for p in net.parameters()) * 4
    assert found.constant == 3 * parameters + 1000
    assert found.batch_in(3 * parameters + 1000 + 199) == 1
    assert found.batch_in(100) == 0


def test_the_count_equals_a_real_step():
    net, image = conv_net(), torch.randn(2, 3, 48, 48)
    net(image).sum().backward()
    held, peak = held_and_peak(lambda: net(image).sum())
    counted = training_memory(net, tuple(image.shape))
    maps = 2 * 48 * 48 * 4 * (8 + 8 + 4)  # what convolutions and activations keep
    assert counted.held == pytest.approx(held, abs=1024) == pytest.approx(maps, abs=1024)
    assert counted.peak <= peak <= counted.peak + MIB  # workspaces


def test_the_largest_side_fits_and_the_next_does_not(monkeypatch):
    monkeypatch.setitem(NETWORKS, "convolutions", Network(conv_net, 64, "plain"))
    budget = 24 * MIB
    side = counts.largest_side("convolutions", "stored", budget)
    assert side == 448  # 112 bytes a pixel
    assert counts.largest_batch("convolutions", "stored", side, budget) == 1
    assert counts.largest_batch("convolutions", "stored", side + 32, budget) == 0


def test_work_of_a_step():
    net = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    (forward,) = work_of(net, (2, 3, 16, 16), training=False)
    pixels, weights = 2 * 16 * 16, 3 * 8 * 9
    assert forward.flop == 2 * pixels * weights
    assert forward.traffic == 4 * (pixels * (3 + 8) + weights)
    _, backward = work_of(net, (2, 3, 16, 16))
    assert backward.flop == forward.flop  # an image needs no gradient
    depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
    assert work_of(nn.Sequential(net, depthwise), (2, 3, 16, 16))[2].flop == 2 * 2 * pixels * 72
    mbconv = nn.Sequential(ChannelsLast(), MBConv(16, 24, 5, 2))  # of our operators
    for autocast in (None, torch.bfloat16):
        work = [w.flop for w in work_of(mbconv, (2, 16, 8, 8), autocast=autocast)]
        # of the image, which needs no gradient, and of the map between
        depthwise, pointwise = 2 * 2 * 16 * 16 * 25, 2 * 2 * 16 * 16 * 24
        assert sum(work) == 2 * depthwise + 3 * pointwise
    assert Peaks(1e3, 1e3).roof_ms([Work(1000, 1), Work(1, 2000)]) == pytest.approx(3000)


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


def test_kinds_of_operators():
    net = tiny(reversible=False)
    step = Step(net, torch.randn(2, 3, 64, 64))
    with operators.OperatorTimes(2, 64, "cpu") as times:
        step.forward().backward()
    assert {
        "convolution, depthwise", "convolution, 1×1", "batch norm", "activation", "resample",
        "batch norm, activation, gate", "squeeze-excite, classifier", "additions, copies, other",
    } == set(times.kinds)  # fmt: skip
    assert {"none", "level 0", "level 1", "level 2", "level 3"} == set(times.levels)
    depthwise = sum(m.groups > 1 for m in net.modules() if isinstance(m, nn.Conv2d))
    assert 2 * depthwise <= len(times.kinds["convolution, depthwise"]) <= 3 * depthwise


def test_rows_of_a_step(small, tmp_path):
    modes = ("--providers", "reversible", "stored")
    assert bench_step.main(options(tmp_path, "--models", small, *modes)) == 0
    rows = harness.read_rows(tmp_path / "rows.csv")
    found = {(row["provider"], row["mode"]): row for row in rows if row["op"] == small}
    assert {mode for _, mode in found} == {"fwd", "bwd", "update", "step", "eval"}
    ours, stored = found["reversible", "step"], found["stored", "step"]
    for row in (ours, stored):
        parts = sum(float(found[row["provider"], p]["ms_p50"]) for p in ("fwd", "bwd", "update"))
        assert parts == pytest.approx(float(row["ms_p50"]), rel=0.5)
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["ms_p50"]), rel=0.01)
        assert row["optimizer_mib"] == row["gradients_mib"] == row["parameters_mib"]
        assert float(row["share_of_roof"]) > 0
    assert float(ours["saved_mib"]) < float(stored["saved_mib"])
    assert int(ours["operators"]) > int(stored["operators"])


def test_a_wrong_provider_gets_no_time(small, tmp_path, monkeypatch):
    def sabotaged(net):
        net.register_forward_hook(lambda module, args, logits: 1.01 * logits)
        return net

    monkeypatch.setitem(rivals.PROVIDERS, "checkpoint", sabotaged)
    modes = ("--providers", "checkpoint", "stored")
    assert bench_step.main(options(tmp_path, "--models", small, *modes)) == 1
    rows = harness.read_rows(tmp_path / "rows.csv")
    (wrong,) = (row for row in rows if row["provider"] == "checkpoint")
    assert wrong["note"].startswith("WRONG: gradients differ") and wrong["ms_p50"] == ""


def test_running_out_of_memory_is_a_row(small, tmp_path, monkeypatch):
    class Hungry(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, image):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(rivals.PROVIDERS, "stored+compile", Hungry)
    providers = ("--providers", "stored", "stored+compile")
    assert bench_step.main(options(tmp_path, "--models", small, *providers)) == 0
    rows = harness.read_rows(tmp_path / "rows.csv")
    (full,) = (row for row in rows if row["provider"] == "stored+compile")
    assert (full["mode"], full["note"], full["ms_p50"]) == ("step", "out of memory", "")
    assert any(row["provider"] == "stored" and row["ms_p50"] for row in rows)


def test_old_rows_parse_and_survive(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("date,op,provider,mode,ms_p50\n2026-01-01,old,ours,fwd,1.5\n")
    harness.record(path, [{"op": "new", "provider": "stored", "mode": "step", "largest": "3"}])
    old, new = harness.read_rows(path)
    assert old["ms_p50"] == "1.5" and old["largest"] == ""
    assert new["largest"] == "3" and list(new) == harness.COLUMNS


def counted_rows():
    """As bench_memory writes them, of round numbers."""
    rows = []
    for name, mode, mib in (
        ("revbifpn_s6", "reversible", "100"),
        ("revbifpn_s6", "stored", "2000"),
        ("efficientnet_b7", "stored", "3000"),
    ):
        row = bench_memory.row_of(name, mode, "an image", NETWORKS[name].side, "fp32")
        rows.append(row | {"peak_mib": mib, "saved_mib": "10", "gflop": "76"})
    for extra in (2, 4):
        for mode, mib in (("reversible", "7"), ("stored", str(40 * extra))):
            name = f"revbifpn_s0 with {extra} extra silos"
            row = bench_memory.row_of(name, mode, "depth", 224, "fp32")
            rows.append(row | {"peak_mib": mib, "saved_mib": mib})
    return rows


def test_the_report_says_what_the_rows_say(small, tmp_path):
    results = tmp_path / "results"
    harness.record(results / "memory.csv", counted_rows())
    machine = str(results / "cpu-torch2.csv")
    modes = ("--providers", "reversible", "stored")
    bench_step.main([*options(tmp_path, "--models", small, *modes), "--output", machine])
    failed = harness.read_rows(results / "cpu-torch2.csv")[-1]
    harness.record(
        results / "cpu-torch2.csv",
        [failed | {"provider": "checkpoint", "mode": "step", "ms_p50": "", "note": "WRONG: by 2"}],
    )
    target = tmp_path / "REPORT.md"
    step_report.main(
        ["--results", str(results), "--figures", str(tmp_path / "figures"), "--output", str(target)]
    )
    text = target.read_text()
    assert "| EfficientNet-B7 at 600 over S6 at 352, an image, fp32 | 30.0× | 19.8× |" in text
    assert "| held for each image and added silo, S0 | 0 bytes | 0 |" in text
    assert "| revbifpn_s6 | 352 | 38.00 | 0.105 | 2.097 |" in text
    assert "WRONG: by 2" in text and "Not measured yet: no row here is from one." in text
    pictures = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert {"memory-macs.png", "memory-depth.png"} < pictures
    assert sum(name.startswith(("pareto-", "roofline-")) for name in pictures) == 2


def test_measured_timings_are_of_what_ran():
    step = Step(conv_net(), torch.randn(2, 3, 16, 16))
    step()
    first = [0.0, 9.0, 9.0, 9.0]  # warms up, and is not counted
    step.marks = [first, [0.0, 0.001, 0.003, 0.007]]
    found = {phase: round(timing.p50, 6) for phase, timing in step.phases().items()}
    assert found == {"fwd": 1.0, "bwd": 2.0, "update": 4.0}
    assert dataclasses.astuple(harness.Timing.of([2.0])) == (2.0, 2.0, 2.0)
