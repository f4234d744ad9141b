"""How maps lie in memory: shape, strides and memory format."""

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """What a launch plan needs to know of a tensor; hashable, so that plans can be cached."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Geometry":
        return cls(tensor.shape, tensor.stride(), tensor.itemsize)

    @property
    def channels_last(self) -> bool:
        return self.strides[1] == 1 and self.strides[3] != 1


def is_channels_last(maps: Tensor) -> bool:
    """Whether neighbours in memory are channels, as in channels_last and slices of it."""
    strides = maps.stride()
    return strides[1] == 1 and strides[3] != 1


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_maps(like: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialised (N, C, *size) on `like`'s device and in its memory format."""
    layout = memory_format(is_channels_last(like))
    shape = (*like.shape[:2], *size)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def in_format(maps: Tensor, channels_last: bool) -> Tensor:
    """`maps`, copied if expanded or in the other memory format, which kernels read slowly."""
    is_expanded = 0 in maps.stride()
    if not is_expanded and is_channels_last(maps) == channels_last:
        return maps
    return maps.contiguous(memory_format=memory_format(channels_last))
