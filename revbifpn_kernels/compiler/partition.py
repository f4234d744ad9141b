"""The partitioner that splits a joint graph once its backward restores the maps of chains."""

from typing import Any

from torch import fx
from torch._functorch import config

from . import inverse, tags
from .inverse import restore_maps
from .pytorch import private

_Partitioner = private("torch._inductor.custom_graph_pass", "CustomPartitionerFn")
_partition_by_min_cut = private(
    "torch._functorch.partitioners", "min_cut_rematerialization_partition"
)
_hash_of_files = private("torch._inductor.custom_graph_pass", "get_hash_for_files")


class ReversiblePartitioner(_Partitioner):
    """Splits by min-cut, or by the partitioner `inner`; graphs without a chain as without this."""

    restores_maps = True

    def __init__(self, inner: _Partitioner | None = None) -> None:
        self.inner = inner

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **options: Any):
        is_restoring = restore_maps(gm)
        partition = self.inner or _partition_by_min_cut
        # With CSE, what is computed again would become what the forward has computed.
        with config.patch(cse=config.cse and not is_restoring):
            return partition(gm, joint_inputs, **options)

    def uuid(self) -> Any:
        """Identifies the rewrite in the compiler's caches; None, for no caching, if `inner` has."""
        inner = None if self.inner is None else self.inner.uuid()
        if self.inner is not None and inner is None:
            return None
        return _hash_of_files((__file__, inverse.__file__, tags.__file__)), inner
