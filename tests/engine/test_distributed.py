"""DDP, FSDP2 and synchronised batch norm on two gloo processes, against one process."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from chains import LATTICE, growing, mbconv, plain, silos, stored, streams
from processes import on_two_processes
from steps import assert_same_bits, loss_of, named_gradients, relative_error
from tiny import tiny
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from revbifpn_kernels import MBConv, RevBlock, convert_sync_batchnorm


def batches(kind, count: int = 1) -> list:
    """The same on every rank: `count` batches of 4 samples."""
    torch.manual_seed(7)
    return [streams(kind, batch=4, dtype=torch.float64) for _ in range(count)]


def share(xs, rank: int) -> list:
    return [x[2 * rank : 2 * rank + 2] for x in xs]


def clean(grads: dict) -> dict:
    return {name.removeprefix("module."): grad for name, grad in grads.items()}


def check_ddp(rank: int) -> None:
    chain = growing(2, plain).double()
    reference = stored(chain)
    ddp = DistributedDataParallel(chain, bucket_cap_mb=0.001)
    (xs,) = batches(growing)
    loss_of(ddp(*share(xs, rank))).backward()
    (sum(loss_of(reference(*share(xs, r))) for r in range(2)) / 2).backward()
    assert relative_error(clean(named_gradients(ddp)), named_gradients(reference)) < 1e-12

    # Accumulation: the first half of the step is not reduced.
    for net in (ddp, reference):
        net.zero_grad()
    first, second = batches(growing, 2)
    with ddp.no_sync():
        loss_of(ddp(*share(first, rank))).backward()
    loss_of(ddp(*share(second, rank))).backward()
    parts = [loss_of(reference(*share(xs, r))) for xs in (first, second) for r in range(2)]
    (sum(parts) / 2).backward()
    assert relative_error(clean(named_gradients(ddp)), named_gradients(reference)) < 1e-12

    # Two forwards, then one backward.
    for net in (ddp, reference):
        net.zero_grad()
    (loss_of(ddp(*share(first, rank))) + loss_of(ddp(*share(second, rank)))).backward()
    parts = [loss_of(reference(*share(xs, r))) for xs in (first, second) for r in range(2)]
    (sum(parts) / 2).backward()
    assert relative_error(clean(named_gradients(ddp)), named_gradients(reference)) < 1e-12


def check_overlap(rank: int) -> None:
    """Gradients of the last block are reduced before the backward of the first begins."""
    chain = silos(3, plain)
    order = []

    class Recorded(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            if torch.is_grad_enabled():
                order.append("run")
            return self.inner(x)

    chain[0].up["2_1"] = Recorded(chain[0].up["2_1"])
    ddp = DistributedDataParallel(chain, bucket_cap_mb=0.001)

    def reduce(state, bucket):
        order.append("reduce")
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0] / 2)
        )

    ddp.register_comm_hook(None, reduce)
    loss_of(ddp(*streams(silos))).backward()  # buckets are ordered after the first step
    order.clear()
    loss_of(ddp(*streams(silos))).backward()
    assert order.index("run") >= 2, order


def check_fsdp(rank: int) -> None:
    chain = growing(2, plain).double()
    reference = copy.deepcopy(chain)
    for block in chain:
        fully_shard(block)
    fully_shard(chain)
    (xs,) = batches(growing)
    for _ in range(2):  # twice: sharded again after the backward
        chain.zero_grad()
        reference.zero_grad()
        loss_of(chain(*share(xs, rank))).backward()
        (sum(loss_of(reference(*share(xs, r))) for r in range(2)) / 2).backward()
        full = {name: p.grad.full_tensor() for name, p in chain.named_parameters()}
        assert relative_error(full, named_gradients(reference)) < 1e-12


def check_inner_sharding(rank: int) -> None:
    block = RevBlock(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    fully_shard(block.f)
    fully_shard(block)
    with pytest.raises(
        RuntimeError, match=r"FSDPConv2d is sharded by itself .* fully_shard\(block\)"
    ):
        block(torch.randn(2, 8, 4, 4, requires_grad=True))


def check_batch_norm_under_ddp(rank: int) -> None:
    """Buffers are broadcast before each forward, and move once in it."""
    chain = silos(2).double()
    for module in chain.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    reference = stored(chain)
    ddp = DistributedDataParallel(chain)
    plain_ddp = DistributedDataParallel(reference)
    for xs in batches(silos, 2):
        for net in (ddp, plain_ddp):
            loss_of(net(*share(xs, rank))).backward()
    grads = [clean(named_gradients(net)) for net in (ddp, plain_ddp)]
    assert relative_error(*grads) < 1e-9
    assert_same_bits(
        {name: b for name, b in chain.named_buffers() if "num_batches" in name},
        {name: b for name, b in reference.named_buffers() if "num_batches" in name},
    )


def without_zeros(grads: dict, exact: dict) -> tuple[dict, dict]:
    """Both without those of biases that a later norm takes away: rounding errors of 0."""
    largest = max(grad.abs().max() for grad in exact.values())
    kept = [name for name, grad in exact.items() if grad.abs().max() > 1e-9 * largest]
    assert all(grads[name].abs().max() < 1e-9 * largest for name in exact.keys() - kept)
    return {name: grads[name] for name in kept}, {name: exact[name] for name in kept}


def check_fused_synchronised_batch_norm(rank: int) -> None:
    """Networks on unequal shares of a batch, against one process with the whole batch."""
    torch.manual_seed(7)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    exchanges = []
    all_reduce = dist.all_reduce
    for reversible in (True, False):
        whole = tiny(reversible=reversible).double()
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in whole.modules())
        shared = convert_sync_batchnorm(copy.deepcopy(whole))
        ddp = DistributedDataParallel(shared)

        def counted(*arguments, **options):
            exchanges.append(1)
            return all_reduce(*arguments, **options)

        with mock.patch.object(dist, "all_reduce", counted):
            outputs = ddp(images[mine])
            assert len(exchanges) == norms
            outputs.square().sum().backward()
            assert len(exchanges) == 2 * norms  # the recompute exchanges nothing
        exchanges.clear()
        expected = whole(images)
        expected.square().sum().backward()
        assert relative_error({"y": outputs}, {"y": expected[mine]}) < 1e-9
        grads = {name: 2 * grad for name, grad in clean(named_gradients(ddp)).items()}
        assert relative_error(*without_zeros(grads, named_gradients(whole))) < 1e-9
        buffers = [dict(net.named_buffers()) for net in (shared, whole)]
        torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-9)
        for net in (shared, whole):
            net.eval()
        assert relative_error({"y": shared(images)}, {"y": whole(images)}) < 1e-9


def check_synchronised_norms_under_autocast(rank: int) -> None:
    """In half precision the reversible and the stored network exchange the same statistics."""
    net = convert_sync_batchnorm(tiny(lattice=LATTICE))
    reference = stored(net)
    images = torch.randn(2, 3, 64, 64)
    for each in (net, reference):
        with torch.autocast("cpu", torch.bfloat16):
            each(images).float().square().sum().backward()
    assert_same_bits(named_gradients(net), named_gradients(reference))


def check_as_one_process(whole: nn.Module, images, rank: int, split: int, adapt=None) -> None:
    """Outputs, gradients and buffers; the first process has `split` of the images."""
    mine = slice(0, split) if rank == 0 else slice(split, len(images))
    whole = whole.double()
    shared = convert_sync_batchnorm(copy.deepcopy(whole))
    assert list(shared.state_dict()) == list(whole.state_dict())
    if adapt is not None:
        adapt(shared)
    ddp = DistributedDataParallel(shared)
    inputs = images[mine].clone().requires_grad_(), images.clone().requires_grad_()
    for net, x in zip((ddp, whole), inputs, strict=True):
        net(x).sin().sum().backward()
    grads = {name: 2 * grad for name, grad in clean(named_gradients(ddp)).items()}
    assert relative_error(*without_zeros(grads, named_gradients(whole))) < 1e-9
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad[mine], rtol=1e-9, atol=1e-9)
    buffers = [dict(net.named_buffers()) for net in (shared, whole)]
    torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-9)


def check_synchronised_norms_of_any_module(rank: int) -> None:
    """With and without an affine map and running statistics; one process may have no image."""
    images = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    untracked = nn.BatchNorm2d(4, momentum=None, track_running_stats=False)
    for last in (nn.BatchNorm2d(4, affine=False, momentum=None), untracked):
        for split in (1, 3):
            whole = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), copy.deepcopy(last))
            check_as_one_process(whole, images, rank, split)


def check_processes_that_run_different_paths(rank: int) -> None:
    """One MBConv is fused; that of the other process has a hook, or no image."""

    def hook(net):
        if rank == 0:
            net.project.conv.register_forward_hook(lambda *call: None)

    images = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    for split, adapt in ((1, hook), (3, None), (3, hook)):
        check_as_one_process(MBConv(6, 4, se_ratio=0.5), images, rank, split, adapt)


def check_synchronised_norms_in_half_precision(rank: int) -> None:
    """Parameters as well, for which fused stages have no kernels."""
    net = convert_sync_batchnorm(MBConv(6, 4)).to(torch.bfloat16)
    x = torch.randn(2, 6, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    net(x).float().square().sum().backward()
    assert all(g.dtype == torch.bfloat16 for g in (x.grad, *named_gradients(net).values()))


def check_converted_norms(rank: int) -> None:
    """A converted norm shares tensors with the given one, but neither hooks nor entries."""
    group = dist.new_group([0, 1])
    norm = nn.SyncBatchNorm(4, process_group=group)
    first = convert_sync_batchnorm(norm)
    assert first.process_group is group and first.weight is norm.weight
    first.register_forward_hook(lambda *call: None)
    first.weight = nn.Parameter(torch.zeros(4))
    assert not norm._forward_hooks and norm.weight.all()
    other = dist.new_group([0, 1])
    assert convert_sync_batchnorm(first, other).process_group is other
    with pytest.raises(ValueError, match="4D"):
        first(torch.ones(2, 4))
    shared = convert_sync_batchnorm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}))
    assert type(shared["a"]) is not type(norm) and shared["a"] is shared["b"][0]


def check_synchronised_norms_refuse(rank: int) -> None:
    block = convert_sync_batchnorm(MBConv(4, 4))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="synchronised batch norm has no gradient of gradients"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


def check_synchronised_batch_norm(rank: int) -> None:
    """PyTorch's, against the plain network, and with fewer gathers than two runs would make."""
    run_synchronised_batch_norm_on_cpus()
    chain = nn.SyncBatchNorm.convert_sync_batchnorm(silos(2, mbconv))
    chain.lattice = LATTICE
    reference = stored(chain)
    norms = sum(isinstance(module, nn.SyncBatchNorm) for module in chain.modules())
    gathers = []
    gather = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: gathers.append(1) or gather(*args, **kwargs)
    (xs,) = batches(silos)
    for net in (chain, reference):
        torch.manual_seed(rank)
        loss_of(net(*[x.float() for x in share(xs, rank)])).backward()
        assert len(gathers) == norms > 0
        gathers.clear()
    assert_same_bits(named_gradients(chain), named_gradients(reference))
    assert_same_bits(dict(chain.named_buffers()), dict(reference.named_buffers()))


def run_synchronised_batch_norm_on_cpus() -> None:
    """PyTorch has the parts of SyncBatchNorm for GPUs only; these are their definitions."""
    forward = nn.SyncBatchNorm.forward

    def forward_on_cpu(self, x):
        """It refuses CPUs, but takes whatever device an extension registers."""
        with mock.patch("torch._C._get_privateuse1_backend_name", lambda: "cpu"):
            return forward(self, x)

    nn.SyncBatchNorm.forward = forward_on_cpu
    library = torch.library.Library("aten", "IMPL")

    def per_channel(v):
        return v.view(1, -1, 1, 1)

    def stats(x, eps):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, (variance + eps).rsqrt()

    def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        weights = counts.view(-1, 1) / counts.sum()
        mean = (means * weights).sum(0)
        variance = ((invstds**-2 - eps + (means - mean) ** 2) * weights).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
        return mean, (variance + eps).rsqrt()

    def elemt(x, weight, bias, mean, invstd, eps):
        scale = per_channel(weight * invstd)
        return (x - per_channel(mean)) * scale + per_channel(bias)

    def backward_reduce(grad, x, mean, invstd, weight, *needed):
        centred = grad * (x - per_channel(mean))
        sums = grad.sum((0, 2, 3)), centred.sum((0, 2, 3))
        return *sums, sums[1] * invstd, sums[0]

    def backward_elemt(grad, x, mean, invstd, weight, sum_grad, sum_centred, counts):
        count = counts.sum()
        centred = (x - per_channel(mean)) * per_channel(invstd**2 * sum_centred / count)
        return (grad - per_channel(sum_grad / count) - centred) * per_channel(invstd * weight)

    library.impl("batch_norm_stats", stats, "CPU")
    library.impl("batch_norm_gather_stats_with_counts", gather, "CPU")
    library.impl("batch_norm_elemt", elemt, "CPU")
    library.impl("batch_norm_backward_reduce", backward_reduce, "CPU")
    library.impl("batch_norm_backward_elemt", backward_elemt, "CPU")
    _libraries.append(library)


_libraries = []  # a Library takes its kernels away when it is deleted


def test_two_processes(tmp_path):
    """One start for all: it takes most of the time. The last check changes PyTorch's kernels."""
    on_two_processes(
        tmp_path,
        check_ddp,
        check_overlap,
        check_fsdp,
        check_inner_sharding,
        check_batch_norm_under_ddp,
        check_fused_synchronised_batch_norm,
        check_synchronised_norms_under_autocast,
        check_synchronised_norms_of_any_module,
        check_processes_that_run_different_paths,
        check_synchronised_norms_in_half_precision,
        check_converted_norms,
        check_synchronised_norms_refuse,
        check_synchronised_batch_norm,
    )
