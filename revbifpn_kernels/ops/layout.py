"""How maps lie in memory: shape, strides and memory format."""

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """All of a tensor that a launch's plan depends on; hashable, so that plans are cached."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Geometry":
        return cls(tensor.shape, tensor.stride(), tensor.itemsize)

    @property
    def channels_last(self) -> bool:
        """Whether neighbours in memory are channels, as in channels_last and slices of it."""
        return self.strides[1] == 1 and self.strides[3] != 1


def empty_maps(like: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialised (N, C, *size) on `like`'s device and in its memory format."""
    layout = torch.channels_last if Geometry.of(like).channels_last else torch.contiguous_format
    shape = (*like.shape[:2], *size)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def in_format(maps: Tensor, channels_last: bool) -> Tensor:
    """`maps`, copied where expanded or in the other memory format: kernels read those slowly."""
    is_expanded = 0 in maps.stride()
    if not is_expanded and Geometry.of(maps).channels_last == channels_last:
        return maps
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return maps.contiguous(memory_format=layout)
