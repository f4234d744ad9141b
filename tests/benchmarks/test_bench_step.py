"""The benchmarks of whole networks, on cases small enough for a test."""

import pytest
import torch
from tiny import TWO_LEVELS, tiny
from torch import nn

from benchmarks import bench_profile, bench_step
from benchmarks.lib import networks, operators
from benchmarks.lib.networks import NETWORKS, Network
from benchmarks.lib.record import read_rows
from benchmarks.lib.step import Step
from revbifpn_kernels import training_memory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch):
    """A network in the table that takes no time."""
    network = Network(lambda: tiny(reversible=False, **TWO_LEVELS), 64)
    monkeypatch.setitem(NETWORKS, "tiny", network)
    return "tiny"


@pytest.fixture
def bench(small, tmp_path):
    """Runs the benchmark with these providers."""
    path = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--seconds", "0.1", "--output", str(path), "--models", small]
    options += ["--batch", "2", "--side", "64", "--rivals", "--providers"]
    return lambda *providers: (bench_step.main([*options, *providers]), read_rows(path))


def test_the_table_has_all_networks():
    assert {f"efficientnet_b{k}" for k in range(8)} <= set(NETWORKS)
    assert {f"revbifpn_s{k}" for k in range(7)} <= set(NETWORKS)
    assert NETWORKS["efficientnet_b7"].side == 600 and NETWORKS["revbifpn_s6"].side == 352


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", pytest.param("hrnet_w18", marks=pytest.mark.slow), "bifpn_b0"]
)
def test_rivals_train_on_fake_tensors(name):
    memory = training_memory(networks.fake_network(name), (2, 3, 64, 64))
    assert 0 < memory.held <= memory.peak


@pytest.mark.parametrize("name", ["revbifpn_s6", "efficientnet_b7"])
def test_nothing_is_dropped(name):
    net = networks.fake_network(name)
    drops = (nn.Dropout, nn.Dropout2d)
    assert all(m.p == 0 for m in net.modules() if isinstance(m, drops))
    assert not any("DropPath" in type(m).__name__ for m in net.modules())


def test_providers_have_the_same_weights_and_gradients(small):
    image = torch.randn(2, 3, 64, 64)
    gradients = {}
    for name, net in networks.providers_of(small, networks.EAGER).items():
        Step(net, image)()
        gradients[name] = networks.gradients(net)
    for name in ("reversible", "checkpoint"):
        torch.testing.assert_close(gradients[name], gradients["stored"], rtol=1e-3, atol=1e-5)


def test_multiply_adds_of_a_network():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, groups=8, padding=1)
    )
    assert operators.gmacs(net, 16) * 1e9 == pytest.approx(16 * 16 * (3 * 8 * 9 + 8 * 9))


def test_kinds_of_operators():
    net = tiny(reversible=False)
    step = Step(net, torch.randn(2, 3, 64, 64))
    with bench_profile.OperatorTimes(2, "cpu") as times:
        step.forward().backward()
    assert {
        "convolution, depthwise", "convolution, 1×1", "batch norm", "activation", "resample",
        "batch norm, activation, gate", "squeeze-excite, classifier", "additions, copies, other",
    } == set(times.kinds)  # fmt: skip
    depthwise = sum(m.groups > 1 for m in net.modules() if isinstance(m, nn.Conv2d))
    assert 2 * depthwise <= len(times.kinds["convolution, depthwise"]) <= 3 * depthwise


def test_rows_of_a_step(bench):
    status, rows = bench("reversible", "stored")
    assert status == 0
    found = {(row["provider"], row["mode"]): row for row in rows}
    assert {mode for _, mode in found} == {"step", "eval"}
    ours, stored = found["reversible", "step"], found["stored", "step"]
    for row in (ours, stored):
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["ms_p50"]), rel=0.01)
        assert float(row["held_mib"]) <= float(row["peak_mib"])
    assert float(ours["held_mib"]) < float(stored["held_mib"])
    assert int(ours["operators"]) > int(stored["operators"])


def test_a_wrong_provider_gets_no_time(bench, monkeypatch):
    def sabotaged(net):
        net.register_forward_hook(lambda module, args, logits: 1.01 * logits)
        return net

    monkeypatch.setitem(networks.PROVIDERS, "checkpoint", sabotaged)
    status, rows = bench("checkpoint", "stored")
    (wrong,) = (row for row in rows if row["provider"] == "checkpoint")
    assert status == 1
    assert wrong["note"].startswith("WRONG: gradients differ") and wrong["ms_p50"] == ""


def test_running_out_of_memory_is_a_row(bench, monkeypatch):
    class Hungry(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, image):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(networks.PROVIDERS, "stored+compile", Hungry)
    status, rows = bench("stored", "stored+compile")
    (full,) = (row for row in rows if row["provider"] == "stored+compile")
    assert status == 0
    assert (full["mode"], full["note"], full["ms_p50"]) == ("step", "out of memory", "")
    assert any(row["provider"] == "stored" and row["ms_p50"] for row in rows)


class FakeGraph:
    """Runs what it captured."""

    def __init__(self, call):
        self.call, self.replays = call, 0

    def replay(self):
        self.replays += 1
        self.call()

    def pool(self):
        return self


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that a run captures, with the pool of each."""
    made = []

    def capture(call, pool=None):
        made.append((FakeGraph(call), pool))
        made[-1][0].replay()
        return made[-1][0]

    monkeypatch.setattr(bench_step.clocks, "capture", capture)
    return made


def contenders_of(small, *providers):
    options = ["--device", "cpu", "--models", small, "--batch", "2", "--side", "64"]
    run = bench_step.parse(options)
    found = bench_step.bench_group(small, run, providers, (), 0.0)
    return found, [row for contender in found for row in bench_step.rows_of(contender, run)]


def test_a_whole_step_as_a_cuda_graph(small, graphs):
    _, rows = contenders_of(small, "stored", "reversible+graph", "stored+graph")
    found = {(row["provider"], row["mode"]): row for row in rows}
    for provider in ("reversible+graph", "stored+graph"):
        assert float(found[provider, "step"]["peak_mib"]) > 0
        assert float(found[provider, "eval"]["ms_p50"]) > 0
        assert "held_mib" not in found[provider, "step"] and not found[provider, "step"]["note"]
    pools = [pool for _, pool in graphs]
    assert pools[0] is None and all(pool is graphs[0][0] for pool in pools[1:])
    assert all(graph.replays > 6 for graph, _ in graphs)  # and nothing else was timed


def test_a_graph_with_wrong_gradients_gets_no_time(small, graphs, monkeypatch):
    right = FakeGraph.replay

    def replay(graph):
        right(graph)
        for p in graph.call.net.parameters():
            p.grad *= 1.1

    monkeypatch.setattr(FakeGraph, "replay", replay)
    _, rows = contenders_of(small, "stored", "stored+graph")
    (wrong,) = (row for row in rows if row["provider"] == "stored+graph")
    assert wrong["note"].startswith("WRONG: gradients differ") and "ms_p50" not in wrong


def test_a_step_that_is_not_captured_is_a_row(small, monkeypatch):
    def capture(call, pool=None):
        raise bench_step.clocks.NotCaptured("not captured: RuntimeError: draws")

    monkeypatch.setattr(bench_step.clocks, "capture", capture)
    _, rows = contenders_of(small, "stored", "stored+graph")
    (row,) = (row for row in rows if row["provider"] == "stored+graph")
    assert row["note"] == "not captured: RuntimeError: draws" and "ms_p50" not in row
    assert [r["mode"] for r in rows if r["provider"] == "stored"] == ["step", "eval"]


def test_a_graph_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        bench_step.parse(["--device", "cpu", "--providers", "stored+graph"])
    assert "+graph needs --device cuda" in capsys.readouterr().err


def test_on_a_gpu_graphs_channels_last_and_the_tuned_compiler_are_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_step.clocks, "clock_for", lambda device, captures: captures)
    run = bench_step.parse(["--device", "cuda"])
    assert {"reversible+graph", "stored+graph"} <= set(run.providers)
    assert run.layout == "channels_last" and run.clock is False
    assert bench_step.parse(["--device", "cpu"]).layout == "nchw"
    asked = []
    monkeypatch.setattr(bench_step, "bench_group", lambda *given: asked.append(given))
    list(bench_step.groups(run))
    assert {"stored+compile+graph", "reversible+compile+graph"} <= set(asked[-2][2])
    assert "stored+max-autotune" in asked[-1][2]


def test_the_layout_is_that_of_image_and_weights(bench):
    run = bench_step.parse(["--device", "cpu", "--layout", "channels_last"])
    step = bench_step.step_of(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 64, 64), run)
    for tensor in (step.image, step.net.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert bench("stored")[1][0]["layout"] == "nchw"


def test_rivals_of_a_graph_are_graphs_too(small):
    rivals = networks.providers_of("efficientnet_b0", ("stored+graph", "reversible+graph"))
    assert list(rivals) == ["stored+graph"]
