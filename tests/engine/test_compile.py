"""Training steps compiled as a whole: one graph, the right gradients, memory that stays flat.

The backend `aot_eager` traces and rewrites a step as inductor does, and generates no code.
"""

import pytest
import torch
from chains import blocks, growing, levels, mbconv, plain, silos, stored, streams, transform
from steps import gradients_of, loss_of, named_gradients, relative_error
from torch import nn

from benchmarks.lib.memory import held_and_peak
from revbifpn_kernels import RevBlock, Reversible, ReversibleSequential, resample_add
from revbifpn_kernels.compiler import entry

slow = pytest.mark.slow
ADDITIVE = (silos, growing, blocks, levels)


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
@pytest.mark.parametrize("kind", ADDITIVE)
def test_gradients_are_those_of_a_compiled_network_that_stores(kind, make):
    """Also with dropout and stochastic depth: the backward reads the masks of the forward."""
    chain = kind(2, make).double()
    xs = streams(kind, dtype=torch.float64)
    expected = results_of(compiled(stored(chain)), xs)
    assert relative_error(results_of(compiled(chain), xs), expected) < 1e-9


@pytest.mark.parametrize("make", [plain, pytest.param(mbconv, marks=slow)])
@pytest.mark.parametrize("kind", ADDITIVE)
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
