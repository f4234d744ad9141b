"""`python -m revbifpn_kernels info`: versions, devices, backends, and what the models cost."""

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import SIZES, __version__, create_model, macs, training_memory

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
MIB = 2**20
NOT_OURS = "PyTorch's own"  # where it is as fast, such as convolutions on GPUs


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_versions() -> None:
    print(f"revbifpn_kernels {__version__}, Python {platform.python_version()}")
    for package in ("torch", "triton", "timm", "torchvision", "safetensors"):
        print(f"  {package:13}{version_of(package)}")


def print_devices() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"CPU: {platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        print("GPU: none found")
    for k in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(k)
        print(f"GPU {k}: {device.name}, {device.total_memory / 2**30:.0f} GiB")


def print_backends() -> None:
    """Every operator that the library has registered, and what runs it on each device."""
    for op in sorted(torch._C._dispatch_get_all_op_names()):
        if op.startswith("revbifpn::"):
            kernels = (
                f"{backend if _has_kernel(op, device) else NOT_OURS} ({device})"
                for device, backend in (("CPU", "C++"), ("CUDA", "Triton"))
            )
            print(f"  {op.removeprefix('revbifpn::'):32}{', '.join(kernels)}")


def _has_kernel(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, device)


def print_models(names: list[str], side: int | None, dtype: str, reversible: bool) -> None:
    mode = "reversible" if reversible else "stored activations"
    print(f"Training memory of an image, {dtype}, {mode}, without parameters and optimizer:")
    header = ("model", "side", "parameters", "MACs, as published", "held MiB", "peak MiB")
    print("{:13}{:>5}{:>14}{:>20}{:>10}{:>10}".format(*header), flush=True)
    for name in names:
        with torch.device("meta"):
            model = create_model(name, reversible=reversible)
        pixels = side or model.config.resolution
        # The slope between two batches: what does not grow with the batch cancels.
        two, four = (
            training_memory(model, (n, 3, pixels, pixels), autocast=DTYPES[dtype]) for n in (2, 4)
        )
        held, peak = ((b - a) / 2 / MIB for a, b in zip(two, four, strict=True))
        parameters = sum(p.numel() for p in model.parameters())
        counted = macs(model, pixels).official
        row = f"{name:13}{pixels:5}{parameters:14,}{counted:20,}{held:10.1f}{peak:10.1f}"
        print(row, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m revbifpn_kernels",
        description=__doc__,
        epilog="To train: python -m revbifpn_kernels.train, python -m revbifpn_kernels.detect.",
    )
    commands = parser.add_subparsers(required=True, metavar="info")
    info = commands.add_parser("info", help="versions, devices, backends, costs of the models")
    info.add_argument("--model", choices=tuple(SIZES), help="this one alone; all take a minute")
    info.add_argument("--side", type=int, help="of the images, pixels, if not each model's own")
    info.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16 is autocast")
    info.add_argument("--stored", action="store_true", help="memory with stored activations")
    options = parser.parse_args(arguments)
    if options.side is not None and options.side < 32:
        parser.error(f"--side must be at least 32 pixels, got {options.side}")
    print_versions()
    print_devices()
    print("Operators (torch.ops.revbifpn.*), by device:")
    print_backends()
    names = [options.model] if options.model else list(SIZES)
    print_models(names, options.side, options.dtype, not options.stored)
    return 0


if __name__ == "__main__":
    sys.exit(main())
