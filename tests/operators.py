"""Which operators run."""

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Operators(TorchDispatchMode):
    """Lists name, arguments and result of every operator called under it.

    Of tensors it lists the shapes: autograd would copy what somebody else still refers to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shapes = tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), (args, result))
        self.calls.append((func._overloadpacket.__name__, *shapes))
        return result

    @property
    def counts(self) -> Counter:
        return Counter(name for name, _, _ in self.calls)
