"""When a map may be overwritten. The checks run before the kernel, so a refusal loses nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta


def check_memory(op: str, x: Tensor, sources, scales, shifts) -> None:
    """Raise if elements of x share memory with each other or an argument that is not x itself."""
    if x.numel() == 0:
        return
    if _overlaps_itself(x):
        raise ValueError(
            f"{op}: x must not share memory between its elements, got strides {x.stride()}"
        )
    for name, tensors in (("sources", sources), ("scales", scales), ("shifts", shifts)):
        for k, tensor in enumerate(tensors):
            if _overlap(x, tensor):
                raise ValueError(
                    f"{op}: {name}[{k}] must not share memory with x, which changes while it is "
                    f"read; got views of one tensor, offsets {tensor.storage_offset()} and "
                    f"{x.storage_offset()}"
                )


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two indices may reach one element: a stride no longer than all shorter ones span."""
    span = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


def _overlap(x: Tensor, source: Tensor) -> bool:
    """Whether the two share an element and are not the same view; in doubt, yes."""
    shares_storage = x.untyped_storage()._cdata == source.untyped_storage()._cdata
    if source.numel() == 0 or not shares_storage or _view(x) == _view(source):
        return False
    first, second = sorted((x, source), key=lambda tensor: tensor.storage_offset())
    distance = second.storage_offset() - first.storage_offset()
    extent = sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True))
    return distance <= extent and not _are_channel_slices(first, second, distance)


def _view(maps: Tensor) -> tuple:
    return maps.storage_offset(), maps.shape, maps.stride(), maps.dtype


def _are_channel_slices(first: Tensor, second: Tensor, distance: int) -> bool:
    """Whether both are slices of one tensor's channels, `second`'s after `first`'s."""
    if first.stride() != second.stride() or first.dtype != second.dtype:
        return False
    channel = first.stride(1)
    period = min((s for s in first.stride() if s > channel), default=0)
    begin = distance // channel if channel else 0
    return (
        begin * channel == distance
        and begin >= first.shape[1]
        and (begin + second.shape[1]) * channel <= period
    )


def check_autograd_allows(op: str, x: Tensor, others: Sequence[Tensor]) -> None:
    """Raise where autograd cannot record the write, which PyTorch notices only after the write."""
    if not torch.is_grad_enabled():
        return
    if not (x.requires_grad or any(other.requires_grad for other in others)):
        return
    if x.requires_grad and x.is_leaf:
        raise RuntimeError(
            f"{op}: x must not be a leaf that requires grad, because its value would be lost; "
            "got one; call resample_add, or detach x"
        )
    if not x._is_view():
        return
    if x._base.requires_grad and x._base.is_leaf:
        raise RuntimeError(
            f"{op}: x must not be a view of a leaf that requires grad, because the leaf's value "
            "would be lost; got one; call resample_add"
        )
    if _get_creation_meta(x) != CreationMeta.DEFAULT:
        raise RuntimeError(
            f"{op}: x must be a view that autograd can write through, such as a slice x[:, :C]; "
            "got one made by chunk, split or unbind, under no_grad or in a custom Function"
        )
