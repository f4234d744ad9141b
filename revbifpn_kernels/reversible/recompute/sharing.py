"""What the transforms of one call of a block share, such as one draw of random numbers for all."""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

_thread = threading.local()


class Shared(NamedTuple):
    block: nn.Module
    values: dict


@contextlib.contextmanager
def sharing(block: nn.Module) -> Iterator[None]:
    """A call of `block`, whose transforms find each other's values in `shared`."""
    outer = shared()
    _thread.shared = Shared(block, {})
    try:
        yield
    finally:
        _thread.shared = outer


def shared() -> Shared | None:
    """Of the call that this thread is in, but for calls of transforms alone and second runs."""
    return getattr(_thread, "shared", None)
