"""Training steps compiled as a whole: one graph, the right gradients, memory that stays flat.

The backend `aot_eager` traces and rewrites a step as inductor does, and generates no code.
"""

import copy

import pytest
import torch
from chains import blocks, growing, levels, mbconv, plain, silos, stored, streams, transform
from processes import on_two_processes
from steps import gradients_of, loss_of, named_gradients, relative_error
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.lib.memory import held_and_peak
from revbifpn_kernels import Recomputed, RevBlock, Reversible, ReversibleSequential, resample_add
from revbifpn_kernels.compiler import entry
from revbifpn_kernels.mbconv.drop_path import DropPath

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(torch.__version__ < (2, 12), reason="tags need torch 2.12")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(net):
    return entry.compile(net, backend="aot_eager")


def results_of(net, xs) -> dict:
    """`gradients_of`, by the names of a network that is not compiled."""
    results = gradients_of(net, xs)
    return {name.replace("_orig_mod.", ""): value for name, value in results.items()}


def held(net, xs) -> int:
    loss_of(net(*xs)).backward()
    return held_and_peak(lambda: loss_of(net(*xs)))[0]


@pytest.mark.parametrize(
    "make", [plain, pytest.param(transform, marks=slow), pytest.param(mbconv, marks=slow)]
)
@pytest.mark.parametrize("kind", [silos, growing, blocks, levels])
def test_gradients_are_those_of_a_compiled_network_that_stores(kind, make):
    """Also with dropout and stochastic depth: the backward reads the masks of the forward."""
    chain = kind(2, make).double()
    xs = streams(kind, dtype=torch.float64)
    expected = results_of(compiled(stored(chain)), xs)
    assert relative_error(results_of(compiled(chain), xs), expected) < 1e-9


@pytest.mark.parametrize("make", [plain, pytest.param(mbconv, marks=slow)])
@pytest.mark.parametrize(
    "kind", [silos, blocks, *(pytest.param(k, marks=slow) for k in (growing, levels))]
)
def test_what_is_held_does_not_grow_with_depth(kind, make):
    xs = [x.requires_grad_() for x in streams(kind, side=32)]
    activations = held(compiled(stored(kind(1, make))), xs)
    # Not 1 and 3: a single block's inputs are those of the chain, which are not counted.
    two, four = (held(compiled(kind(depth, make)), xs) for depth in (2, 4))
    assert four - two < 0.05 * activations


def test_several_forwards_and_accumulated_gradients():
    chain = growing(1, plain).double()
    twin = stored(chain)
    net = compiled(chain)
    batches = [streams(growing, dtype=torch.float64) for _ in range(3)]
    for module in (net, twin):
        sum(loss_of(module(*xs)) for xs in batches[:2]).backward()
        loss_of(module(*batches[2])).backward()
    assert relative_error(named_gradients(chain), named_gradients(twin)) < 1e-12


def test_a_chain_in_a_transform_is_part_of_it():
    inner = ReversibleSequential(RevBlock(plain(2, 2), plain(2, 2)))

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = inner

        def forward(self, x):
            return self.chain(x)[0]

    chain = ReversibleSequential(RevBlock(First(), plain(4, 4)), RevBlock(plain(4, 4), plain(4, 4)))
    chain = chain.double()
    xs = [torch.randn(2, 8, 8, 8, dtype=torch.float64)]
    expected = results_of(stored(chain), xs)
    assert relative_error(results_of(compiled(chain), xs), expected) < 1e-12


class Scaled(Reversible):
    """Says that it only adds, and does not."""

    is_additive = True

    def __init__(self) -> None:
        super().__init__()
        self.f = plain(4, 4)

    def forward(self, x):
        return (resample_add(x * 2, [self.f(x)]),)

    def inverse(self, y):
        return (y,)


def test_a_stream_without_an_inverse_is_an_error_that_names_the_block():
    chain = ReversibleSequential(*(Scaled() for _ in range(2)))
    with pytest.raises(Exception, match="block 1, Scaled: torch.compile found no inverse for"):
        compiled(chain)(torch.randn(2, 4, 8, 8))


def test_a_partitioner_of_the_users_own_comes_after_ours():
    """It splits the graph whose backward restores maps."""
    from revbifpn_kernels.compiler.partition import ReversiblePartitioner

    class Theirs(torch._inductor.custom_graph_pass.CustomPartitionerFn):
        def __call__(self, gm, inputs, **options):
            seen.append(gm)
            return ReversiblePartitioner()(gm, inputs, **options)

        def uuid(self):
            return "theirs"

    seen = []
    assert ReversiblePartitioner(Theirs()).uuid()[1] == "theirs"
    backend = entry.aot_eager(Theirs())
    net = torch.compile(silos(1, plain), backend=backend, fullgraph=True, dynamic=False)
    xs = [x.requires_grad_() for x in streams(silos)]
    loss_of(net(*xs)).backward()
    assert len(seen) == 1


class Rectified(Recomputed):
    """Its gradient asks which elements of its result are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(transform(7, 7) for _ in range(3))

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return (x.relu(),)


def test_a_block_without_an_inverse_is_computed_again_exactly():
    chain = ReversibleSequential(*blocks(1, plain), Rectified(), *blocks(1, plain)).double()
    xs = streams(blocks, dtype=torch.float64, side=32)
    expected = results_of(compiled(stored(chain)), xs)
    net = compiled(chain)
    assert relative_error(results_of(net, xs), expected) < 1e-9
    # The inputs of the block, the last stream, and masks of dropout; one transform stores 6 maps.
    assert held(net, [x.requires_grad_() for x in xs]) < 7 * xs[0].nbytes


def test_what_comes_before_a_chain_reads_its_own_results():
    """Restored to rounding, a 0 may be negative, where clamp passes no gradient."""
    chain = ReversibleSequential(*(RevBlock(plain(4, 4), plain(4, 4)) for _ in range(2)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = nn.Parameter(torch.randn(8, 1, 1).relu())
            self.chain = chain

        def forward(self, x):
            x = x * self.mask
            return *self.chain(x), x.clamp(min=0)

    net = Network().double()
    xs = [torch.randn(2, 8, 10, 10, dtype=torch.float64)]
    expected = results_of(stored(net), xs)
    assert relative_error(results_of(compiled(net), xs), expected) < 1e-12


@slow
def test_flags_that_change_are_noticed():
    """Evaluation with gradients after training, another probability, another way to train."""
    chain = silos(1, mbconv).double()
    xs = [x.requires_grad_() for x in streams(silos, dtype=torch.float64)]
    net = compiled(chain)
    loss_of(net(*xs)).backward()
    chain.eval()
    buffers = [b.clone() for b in chain.buffers()]
    for ours, theirs in zip(net(*xs), chain(*xs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(chain.buffers(), buffers, strict=True))
    chain.train()
    for part in chain.modules():
        if isinstance(part, DropPath):
            part.probability = 0.0
    chain.zero_grad()
    twin = copy.deepcopy(chain)
    expected = results_of(stored(twin), xs)
    for reversible in (True, False):
        chain.load_state_dict(twin.state_dict())
        chain.reversible = reversible
        assert relative_error(results_of(net, xs), expected) < 1e-9
        chain.zero_grad()


def check_ddp(rank: int) -> None:
    torch._dynamo.reset()
    chain = growing(2, plain).double()
    twin = stored(chain)
    xs = streams(growing, batch=4, dtype=torch.float64)
    for net in map(DistributedDataParallel, (compiled(chain), twin)):
        loss_of(net(*[x[2 * rank : 2 * rank + 2] for x in xs])).backward()
    assert relative_error(named_gradients(chain), named_gradients(twin)) < 1e-12


@slow
def test_two_processes(tmp_path):
    on_two_processes(tmp_path, check_ddp)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        y, _ = self.inner(tokens, tokens, tokens, need_weights=False)
        return y.transpose(1, 2).view_as(x)


def test_an_operator_with_several_random_results():
    chain = ReversibleSequential(*(RevBlock(Attention(), Attention()) for _ in range(2))).double()
    xs = [torch.randn(2, 8, 8, 8, dtype=torch.float64)]
    expected = results_of(stored(chain), xs)
    assert relative_error(results_of(compiled(chain), xs), expected) < 1e-12
