"""`python -m revbifpn_kernels info`: versions, devices, backends, and what the models cost.
`… warmup`: compiles a model's GPU kernels before its first step."""

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import SIZES, __version__, create_model, macs, training_memory

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
MIB = 2**20
NOT_OURS = "PyTorch's own"  # where it is as fast, such as convolutions on GPUs


def print_versions_and_devices() -> None:
    print(f"revbifpn_kernels {__version__}, Python {platform.python_version()}")
    for package in ("torch", "triton", "timm", "torchvision", "safetensors"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {package:13}{version}")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"CPU: {platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        print("GPU: none found")
    for k in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(k)
        print(f"GPU {k}: {device.name}, {device.total_memory / 2**30:.0f} GiB")


def print_backends() -> None:
    """Print every operator that the package has registered, and what runs it on each device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    print("Operators (torch.ops.revbifpn.*), by device:")
    for op in sorted(torch._C._dispatch_get_all_op_names()):
        if op.startswith("revbifpn::"):
            kernels = (
                f"{backend if has_kernel(op, device) else NOT_OURS} ({device})"
                for device, backend in (("CPU", "C++"), ("CUDA", "Triton"))
            )
            print(f"  {op.removeprefix('revbifpn::'):32}{', '.join(kernels)}")


def print_models(names: list[str], side: int | None, dtype: str, reversible: bool) -> None:
    mode = "reversible" if reversible else "stored activations"
    print(f"Training memory per image, {dtype}, {mode}, without parameters and optimizer:")
    header = ("model", "side", "parameters", "MACs, as published", "held MiB", "peak MiB")
    print("{:13}{:>5}{:>14}{:>20}{:>10}{:>10}".format(*header), flush=True)
    for name in names:
        with torch.device("meta"):
            model = create_model(name, reversible=reversible)
        pixels = side or model.config.resolution
        # The difference of two batches: what does not grow with the batch cancels.
        two, four = (
            training_memory(model, (n, 3, pixels, pixels), autocast=DTYPES[dtype]) for n in (2, 4)
        )
        held, peak = ((b - a) / 2 / MIB for a, b in zip(two, four, strict=True))
        parameters = sum(p.numel() for p in model.parameters())
        counted = f"{parameters:14,}{macs(model, pixels).official:20,}"
        print(f"{name:13}{pixels:5}{counted}{held:10.1f}{peak:10.1f}", flush=True)


def show(options: argparse.Namespace) -> None:
    print_versions_and_devices()
    print_backends()
    names = [options.model] if options.model else list(SIZES)
    print_models(names, options.side, options.dtype, not options.stored)


def warm_up(options: argparse.Namespace) -> None:
    from . import warmup

    target = warmup.target_of(options.target)
    with torch.device("meta"):
        model = create_model(options.model, reversible=not options.stored)
    if options.exact:
        model.lattice = 2.0**-12  # its value is an argument of the kernels
    side = options.side or model.config.resolution
    shape = options.batch, model.config.in_chans, side, side
    calls = warmup.calls_of_step(
        model, shape, autocast=DTYPES[options.dtype], channels_last=options.channels_last
    )
    done = warmup.compile_ahead(calls, target)
    print(f"{options.model}, {'×'.join(map(str, shape))}, {options.dtype}: {done}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m revbifpn_kernels",
        description=__doc__,
        epilog="To train: python -m revbifpn_kernels.train, python -m revbifpn_kernels.detect.",
    )
    commands = parser.add_subparsers(required=True, metavar="info|warmup")
    info = commands.add_parser("info", help="versions, devices, backends, costs of the models")
    info.add_argument("--model", choices=tuple(SIZES), help="only this one (all take a minute)")
    info.add_argument("--stored", action="store_true", help="memory with stored activations")
    info.set_defaults(run=show)
    about = "compile the GPU kernels of a training step, on all cores; no GPU needed"
    warm = commands.add_parser("warmup", help=about, description=about)
    warm.add_argument("model", choices=tuple(SIZES))
    warm.add_argument(
        "--batch", type=int, default=64, help="images per step on one GPU (default: 64)"
    )
    warm.add_argument("--stored", action="store_true", help="a step with stored activations")
    warm.add_argument("--exact", action="store_true", help="a step in exact mode")
    warm.add_argument("--channels-last", action="store_true", help="images in channels_last")
    warm.add_argument("--target", help="a GPU, such as sm_90 (default: that of this machine)")
    warm.set_defaults(run=warm_up)
    for command in (info, warm):
        command.add_argument(
            *("--side", "--size"), type=int, help="pixels per side (default: the model's own)"
        )
        command.add_argument(
            "--dtype",
            choices=tuple(DTYPES),
            default="fp32",
            help="bf16: by autocast (default: fp32)",
        )
    options = parser.parse_args(arguments)
    if options.side is not None and options.side < 32:
        parser.error(f"--side must be at least 32 pixels, got {options.side}")
    if getattr(options, "batch", 1) < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    try:
        options.run(options)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
