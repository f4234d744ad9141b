"""The pass that makes a compiled training step reversible.

AOTAutograd traces forward and backward of a step into one graph. Its backward reads maps of the
forward, which would all be saved. `restore_maps` rewrites the graph: where a fusion
y = resample_add(x, sources) consumed a map x, the backward reads resample_add(y, sources, −α)
instead, with the sources computed again from maps restored in the same way. Of a chain only the
last streams are then saved, and what is small or random.

The contract:

- Only nodes that carry a chain's tags (`tags.py`) are computed again, and only they read restored
  maps; all others, such as the stem and the loss, are left to PyTorch's partitioner. Restored maps
  are right to rounding, which the gradient of a stem's ReLU must not see: it asks whether its
  result is 0.
- Small tensors (statistics of norms, gates) and results of operators that may draw random numbers
  are saved, so that the recompute repeats them. PyTorch's fused attention is such an operator.
- A map is restored right before the first node of the backward that reads it, hence one block at a
  time, and no part of the restoring may move into the forward.
- A stream that a block changes by anything but `resample_add`, or whose inverse would need the
  stream itself, is an error that names the block.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .tags import block_of, is_in_transform

aten, prims = torch.ops.aten, torch.ops.prims
FUSE = torch.ops.revbifpn.resample_add.default
_SPLITS = aten.split_with_sizes.default, aten.split.Tensor
_ZEROS = aten.full.default, aten.full_like.default, aten.zeros.default, aten.zeros_like.default
_SAME = "same"  # a recipe for what another node has restored
_MUST_BE_IN_BACKWARD = "must_be_in_backward"

# A node of the restored map's graph: what to call, with nodes of the forward as arguments.
Recipe = tuple[Any, tuple, dict]


def restore_maps(gm: fx.GraphModule) -> bool:
    """Rewrite a joint graph so that its backward restores the maps of reversible chains.

    Returns:
        Whether the graph holds a chain.

    Raises:
        RuntimeError: A stream of a chain has no inverse; the message names block and operator.
    """
    if not any(map(block_of, gm.graph.nodes)):
        return False
    nodes = _without_joins(gm.graph)
    forward = [node for node in nodes if not _is_backward(node)]
    restored = _RestoredMaps(gm.graph, forward)
    for node in nodes:
        if _is_backward(node) and node.op == "call_function" and block_of(node):
            for read in node.all_input_nodes:
                if not _is_backward(read):
                    node.replace_input_with(read, restored.of(read, before=node))
    for node in gm.graph.nodes:
        if _is_backward(node) and node.op == "call_function":
            node.meta["partitioner_tag"] = _MUST_BE_IN_BACKWARD
        if isinstance(node.target, torch._ops.OpOverload) and "eager_input_vals" in node.meta:
            # Inductor keeps these strides: an operator would else be given copies, like other maps.
            node.meta["eager_input_vals"] = _inputs_of(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return True


class _RestoredMaps:
    """The maps that the backward computes again, by the nodes of the forward that they equal."""

    def __init__(self, graph: fx.Graph, forward: list[fx.Node]) -> None:
        self.graph = graph
        self._known: dict[fx.Node, fx.Node] = {}
        self._fusion_of: dict[fx.Node, fx.Node] = {}  # of a stream that it consumes
        self._place_in: dict[fx.Node, tuple[fx.Node, int]] = {}  # of halves that are joined
        self._pieces_of: dict[fx.Node, list[fx.Node]] = {}  # of a stream that is split
        streams = list(filter(_is_of_streams, forward))
        fusions = (node for node in streams if node.target is FUSE)
        self._images = max((node.meta["val"].shape[0] for node in fusions), default=0)
        for node in streams:
            if node.target is FUSE and node.args[0].target not in _ZEROS:
                self._fusion_of.setdefault(node.args[0], node)
            elif node.target is aten.cat.default:
                for place, half in enumerate(node.args[0]):
                    self._place_in[half] = node, place
        for node in streams:
            if node.target in _SPLITS:
                pieces = _results_of(node)
                if all(piece in self._fusion_of for piece in pieces):
                    self._pieces_of.setdefault(node.args[0], pieces)

    def of(self, node: fx.Node, *, before: fx.Node) -> fx.Node:
        """The node of the backward that equals `node`; new nodes are put right before `before`."""
        pending, unfinished = [node], set()
        while pending:
            wanted = pending[-1]
            recipe = None if wanted in self._known else self._recipe(wanted)
            if recipe is None:
                self._known.setdefault(wanted, wanted)
                pending.pop()
                continue
            missing = [read for read in _nodes_in(recipe) if read not in self._known]
            if not missing:
                self._known[wanted] = self._emit(recipe, wanted, before)
                pending.pop()
            elif wanted in unfinished:
                raise RuntimeError(
                    f"{block_of(wanted)}: cannot be inverted under torch.compile, because the "
                    f"inverse of {wanted.target} would need its own result; expected streams that "
                    "change by resample_add of the other streams alone; set reversible=False"
                )
            else:
                unfinished.add(wanted)
                pending += missing
        return self._known[node]

    def _recipe(self, node: fx.Node) -> Recipe | None:
        """How to compute a map of the forward again; None if the forward's own is read."""
        if node.op != "call_function" or self._is_saved(node):
            return None
        if is_in_transform(node):  # exactly, even a stream that a block without an inverse returns
            return node.target, node.args, node.kwargs
        if node in self._fusion_of:
            y = self._fusion_of[node]
            _, sources, scales, shifts, alpha, *options = y.args
            return FUSE, (y, sources, scales, shifts, -alpha, *options), {}
        if node in self._pieces_of:
            return aten.cat.default, (self._pieces_of[node], 1), {}
        if node in self._place_in:
            whole, place = self._place_in[node]
            return self._half(whole, place)
        if not block_of(node):
            return None
        if node.target is operator.getitem or node.target in _SPLITS:
            return node.target, node.args, node.kwargs
        _check_is_last(node)
        return None

    def _is_saved(self, node: fx.Node) -> bool:
        """Whether the backward reads what the forward computed: small tensors, random numbers."""
        if node.target is prims.convert_element_type.default and node.args[0].op == "placeholder":
            return False  # a weight that autocast casts
        return _is_random(node) or _is_small(node.meta.get("val"), self._images)

    def _half(self, whole: fx.Node, place: int) -> Recipe:
        sizes = _channels_of(whole.args[0])
        pieces = self._pieces_of.get(whole, [])
        if _channels_of(pieces) == sizes:
            return _SAME, (pieces[place],), {}
        begin = sum(sizes[:place])
        return aten.slice.Tensor, (whole, 1, begin, begin + sizes[place]), {}

    def _emit(self, recipe: Recipe, like: fx.Node, before: fx.Node) -> fx.Node:
        if recipe[0] is _SAME:
            return self._known[recipe[1][0]]
        target, args, kwargs = fx.map_arg(recipe, self._known.__getitem__)
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**like.meta, "partitioner_tag": _MUST_BE_IN_BACKWARD}
        node.meta.pop("recompute", None)
        args, kwargs = _inputs_of(node)
        # Computed anew, because a restored map may have other strides than the forward's.
        with _fake_mode_of(args):
            node.meta["val"] = target(*args, **kwargs)
        return node


def _without_joins(graph: fx.Graph) -> list[fx.Node]:
    """The nodes, once those that split a stream read the halves that were joined to it.

    Halves that one RevBlock joins and the next one splits are then not copied, nor are their
    gradients.
    """
    for node in list(graph.nodes):
        if node.target not in (*_SPLITS, aten.slice.Tensor):
            continue
        joined = node.args[0]
        if joined.target is not aten.cat.default or not block_of(joined):
            continue
        if node.target is aten.slice.Tensor:
            _read_part(node)
            continue
        halves, pieces = joined.args[0], _results_of(node)
        if _channels_of(halves) == _channels_of(pieces):
            for half, piece in zip(halves, pieces, strict=True):
                piece.replace_all_uses_with(half)
    return list(graph.nodes)


def _read_part(node: fx.Node) -> None:
    """Let what reads a slice of joined channels read the part that it is, if it is one."""
    (joined, dim, begin, end, *step), parts = node.args, node.args[0].args[0]
    if dim != 1 or joined.args[1:] != (1,) or step not in ([], [1]):
        return
    place, end = 0, min(end, joined.meta["val"].shape[1])
    for part, size in zip(parts, _channels_of(parts), strict=True):
        if (begin, end) == (place, place + size):
            node.replace_all_uses_with(part)
        place += size


def _channels_of(nodes: Sequence[fx.Node]) -> list[int]:
    return [node.meta["val"].shape[1] for node in nodes]


def _inputs_of(node: fx.Node) -> tuple[tuple, dict]:
    """The fake tensors and numbers that a node is called with."""
    return fx.map_arg((node.args, node.kwargs), lambda read: read.meta["val"])


def _fake_mode_of(values: Any) -> contextlib.AbstractContextManager:
    modes = (getattr(value, "fake_mode", None) for value in tree_leaves(values))
    return next(filter(None, modes), contextlib.nullcontext())


def _is_backward(node: fx.Node) -> bool:
    is_tangent = node.op == "placeholder" and str(node.target).startswith("tangents")
    tag = node.meta.get("partitioner_tag")
    return is_tangent or tag in ("is_backward", _MUST_BE_IN_BACKWARD)


def _is_random(node: fx.Node) -> bool:
    """Whether a node, or the one of whose results it is one, may draw random numbers."""
    drawn = node.args[0] if node.target is operator.getitem else node
    return torch.Tag.nondeterministic_seeded in getattr(drawn.target, "tags", ())


def _is_small(value: Any, images: int) -> bool:
    """Whether a value holds a number per channel at most, for each image; True for sizes."""
    if isinstance(value, (tuple, list)):
        return False
    if not isinstance(value, Tensor) or value.dim() < 2:
        return True
    rows, _, *pixels = value.shape
    return rows <= images and all(side == 1 for side in pixels)


def _check_is_last(node: fx.Node) -> None:
    """Raise unless no later block of the chain changes a stream, which then may be saved."""
    readers = [user for user in node.users if _is_of_streams(user) and not _is_backward(user)]
    is_known = node.target in (FUSE, aten.cat.default, *_ZEROS)
    if not is_known or not all(u.target is FUSE and u.args[0] is not node for u in readers):
        raise RuntimeError(
            f"{block_of(node)}: torch.compile found no inverse for {node.target}, so that its "
            "result would be stored; expected streams that change by resample_add alone; set "
            "reversible=False"
        )


def _is_of_streams(node: fx.Node) -> bool:
    """Whether a block itself made the node, rather than one of its transforms."""
    return block_of(node) is not None and not is_in_transform(node)


def _results_of(node: fx.Node) -> list[fx.Node]:
    users = [user for user in node.users if user.target is operator.getitem]
    return sorted((user for user in users if not _is_backward(user)), key=lambda user: user.args[1])


def _nodes_in(recipe: Recipe) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(recipe, found.append)
    return iter(found)
