"""Which sample is in which step, and what it draws: functions of the seed and the step alone."""

import dataclasses

import numpy as np
import pytest
import torch

from revbifpn_kernels.recipes.classify.augment import Collate, for_training
from revbifpn_kernels.recipes.classify.data import Training, digits
from revbifpn_kernels.recipes.classify.options import parse
from revbifpn_kernels.recipes.run.errors import RunError
from revbifpn_kernels.recipes.run.order import Key, MicroBatches, Order, drawing_from
from revbifpn_kernels.recipes.run.samples import split


def test_the_order_is_a_function_of_the_step():
    order = Order(103, 20, seed=3)
    epochs = [[key for s in range(5 * e, 5 * e + 5) for key in order.keys(s)] for e in range(3)]
    for epoch, keys in enumerate(epochs):
        assert {key.epoch for key in keys} == {epoch}
        assert len({key.index for key in keys}) == 100
    assert len({tuple(key.index for key in keys) for keys in epochs}) == 3
    torch.manual_seed(1)
    again = Order(103, 20, seed=3)
    assert [key for s in range(15) for key in again.keys(s)] == sum(epochs, [])
    assert Order(103, 20, seed=4).keys(0) != order.keys(0)
    shares = [
        list(MicroBatches(order, 2, 4, accumulate=2, rank=rank, ranks=2)) for rank in range(2)
    ]
    together = [key for part in zip(*shares, strict=True) for keys in part for key in keys]
    assert together == order.keys(2) + order.keys(3)
    with pytest.raises(RunError, match="multiple of --accumulate 3 times 2 processes, got 20"):
        MicroBatches(order, 0, 1, accumulate=3, ranks=2)


def test_samples_draw_from_generators_of_their_own():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with drawing_from(5):
        first = torch.rand(3), np.random.rand()
    with drawing_from(5):
        assert torch.equal(first[0], torch.rand(3)) and first[1] == np.random.rand()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_each_image_is_augmented_anew_in_each_epoch():
    found = digits(1, 32, 0)
    transform = for_training(parse(["--erasing=1", "--augment=none"]), "L", 32)

    def erased(epoch: int, index: int, seed: int = 0) -> torch.Tensor:
        images = torch.ones_like(found.train.images)
        source = dataclasses.replace(found.train, images=images)
        return Training(source, transform, seed)[Key(epoch, index)].image == 0

    first = erased(0, 0)
    assert first.any() and torch.equal(first, erased(0, 0))
    for other in (erased(1, 0), erased(0, 1), erased(0, 0, seed=1)):
        assert not torch.equal(first, other)


def test_mixtures_are_of_their_batch():
    found = digits(1, 32, 0)
    transform = for_training(parse(["--augment=none"]), "L", 32)
    samples = [Training(found.train, transform, 0)[Key(0, k)] for k in range(8)]
    mixed = Collate(10, mixup=1.0)(samples)
    torch.rand(5)
    assert torch.equal(mixed.images, Collate(10, mixup=1.0)(samples).images)
    assert not torch.equal(mixed.images, Collate(10, mixup=1.0)(samples[::-1]).images.flip(0))
    assert mixed.labels.sum(1).tolist() == pytest.approx([1.0] * 8)
    assert Collate()(samples).labels.tolist() == [found.train.labels[k] for k in range(8)]


def test_splits_are_disjoint_complete_and_have_all_classes():
    data = digits(1, 32, 0)
    accumulate = [data.train, data.val, data.test]
    names = [name for part in accumulate for name in part.names]
    assert sorted(names) == sorted(f"digit {k}" for k in range(200))
    assert all(set(part.labels) == set(range(10)) for part in accumulate)
    assert split([0, 1] * 50, 0, (0.8, 0.1, 0.1)) == split([0, 1] * 50, 0, (0.8, 0.1, 0.1))
    assert digits(1, 32, 1).test.names != data.test.names
    assert [len(part) for part in split([0] * 3 + [1] * 2, 0, (0.8, 0.1, 0.1))] == [3, 1, 1]
