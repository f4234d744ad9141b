"""Tables of times: the best rival, and columns that only some rows have."""

import pytest

from benchmarks.lib import figures, markdown, tables

CONDITIONS = {
    "date": "2026-01-02", "commit": "abc1234", "device": "NVIDIA H200", "torch": "2.12.0",
    "command": "python -m benchmarks.bench_ops", "note": "S6",
}  # fmt: skip
OP = {"op": "resample_add", "mode": "fwd", "dtype": "fp32", "layout": "nchw",
      "shape": "2x4x16x16", "threads": "2"}  # fmt: skip
GPU = {"share_of_peak": "0.62", "ms_low": "0.98", "ms_high": "1.01", "samples": "40",
       "sm_mhz_before": "1980", "sm_mhz_after": "1755", "throttle": "power cap"}  # fmt: skip


def row(provider, ms, **columns):
    rates = {"gbps": "1.5", "share_of_copy": "0.9"}
    return CONDITIONS | OP | rates | {"provider": provider, "ms_p50": ms} | columns


def cells(text):
    """Each line of a table by its header."""
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]]
                         for line in text.splitlines() if line.startswith("|")]  # fmt: skip
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_the_best_rival_is_the_fastest_right_one_of_the_same_run():
    rows = [
        row("ours", "1"), row("copy", "0.1"), row("torch", "4"), row("compile", "2"),
        row("max-autotune", "", note="differs: y is off by 1e-3"),
    ]  # fmt: skip
    (line,) = cells(tables.ops_table(rows))
    assert (line["× best rival"], line["× eager"], line["× compile"]) == ("2.0", "4.0", "2.0")
    assert line["× max-autotune"] == "differs: y is off by 1e-3"
    rows[3] |= {"commit": "0ldc0de"}
    assert cells(tables.ops_table(rows))[0]["× best rival"] == "4.0"


def test_old_rows_have_no_new_columns():
    text = tables.ops_table([row("ours", "1"), row("torch", "4")])
    (line,) = cells(text)
    assert {"of peak", "× max-autotune"}.isdisjoint(line) and line["× best rival"] == "4.0"
    assert "95 %" not in text and "SM clock" not in text


def test_rows_of_a_gpu_say_how_sure_they_are():
    text = tables.ops_table([row("ours", "1", **GPU), row("torch", "4")])
    assert cells(text)[0]["of peak"] == "62 %"
    assert "95 % intervals of medians: ±2.0 %, ±2.0 % at most" in text
    assert "SM clock 1755 to 1980 MHz; clock held down by power cap" in text


def test_the_best_rival_of_a_stage():
    rows = [row(name, ms, op="norm_act", mode="fwd+bwd", note="")
            for name, ms in (("ours", "1"), ("torch", "3"), ("max-autotune", "2"))]  # fmt: skip
    found = {line["2×4×16×16"]: line["fp32, nchw"] for line in cells(tables.norms_table(rows))}
    assert found == {"`norm_act`: × best rival": "2.0", "`norm_act`: × eager": "3.0",
                     "`norm_act`: × tuned": "2.0"}  # fmt: skip


def step(provider, ms, **columns):
    sizes = {"held_mib": "4", "peak_mib": "25", "images_per_s": "8", "operators": "7"}
    made = {"op": "revbifpn_s0", "mode": "step", "note": "", **sizes}
    return row(provider, ms) | made | columns


@pytest.fixture
def steps():
    return [
        step("reversible", "300", host_ms="90"), step("stored", "200"),
        step("reversible+graph", "120", held_mib="", operators=""),
        step("stored+graph", "100", held_mib="", operators=""),
        step("stored", "150", layout="channels_last"),
    ]  # fmt: skip


def test_steps_as_cuda_graphs_and_in_two_layouts(steps):
    found = {(line["shape"], line["mode"]): line for line in cells(tables.all_steps_table(steps))}
    nchw, last = "2×4×16×16", "2×4×16×16 channels_last"
    assert len(found) == 5 and found[last, "stored activations"]["step ms"] == "150"
    assert found[nchw, "reversible"]["× best rival"] == "0.33"
    assert found[nchw, "reversible"]["host ms"] == "90"
    graph = found[nchw, "reversible, CUDA graph"]
    assert (graph["× best rival"], graph["transient"]) == ("0.83", "")
    assert found[nchw, "stored activations"]["× best rival"] == ""
    assert "host ms" not in tables.all_steps_table(steps[1:])


def test_a_loss_of_a_graph_is_to_a_graph(steps):
    steps.append(step("stored+max-autotune", "250", peak_mib=""))
    found = {line["faster than reversible"]: line["our time over its"]
             for line in cells(tables.losses_table(steps))}  # fmt: skip
    assert found == {"stored activations": "1.50×", "stored activations, CUDA graph": "1.20×",
                     "stored, compiled and tuned": "1.20×"}  # fmt: skip


def test_the_figure_has_the_graphs(steps):
    (axes,) = figures.pareto(steps[:4]).axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["reversible", "stored", "reversible, CUDA graph", "stored, CUDA graph"]
    assert markdown.mode("stored+compile+graph") == "stored, compiled, CUDA graph"


def test_a_network_in_two_layouts_has_its_shapes_in_the_step_table(steps):
    names = [line["network"] for line in cells(tables.step_table(steps)) if line["network"]]
    assert names == ["RevBiFPN-S0 at 2×4×16×16", "RevBiFPN-S0 at 2×4×16×16 channels_last"]
    assert cells(tables.step_table(steps[:2]))[0]["network"] == "RevBiFPN-S0"


def test_traffic_beside_the_least():
    counts = {
        "kernel": "_resample_add_cells_kernel", "dtype": "fp32", "layout": "nchw",
        "scales": "2+4+8", "target": "sm_90", "triton": "3.7.0", "l2_bytes": "9.4",
        "sectors_per_request": "13.00", "fewest_sectors": "10.00", "dram_bytes": "9.3",
        "compulsory_bytes": "9.1", "l1_over_dram": "1.20", "shared_wavefronts": "0.0",
        "fewest_shared_wavefronts": "0.0",
    }  # fmt: skip
    totals = counts | {"kernel": "_norm_act_totals_kernel"}
    (line,) = cells(tables.traffic_table([CONDITIONS | counts, CONDITIONS | totals]))
    assert line["kernel"] == "`resample_add_cells`"
    assert line["sectors per request"] == "**13 (10)**"
    assert line["DRAM bytes per element"] == "9.3 (9.1)"
    assert line["L1 time over DRAM time"] == "**1.2**"
    assert line["shared wavefronts per element"] == "0 (0)"
