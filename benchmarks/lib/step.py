"""A training step, and an evaluation, of any network."""

import argparse

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .record import DTYPES
from .workloads import LAYOUTS


class Step:
    """Forward, backward and update by SGD with momentum.

    The learning rate is 0: the same work, and weights that stay comparable.
    """

    def __init__(self, net: nn.Module, image: Tensor, autocast: torch.dtype | None = None) -> None:
        self.net, self.image, self.autocast = net.train(), image, autocast
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)

    def forward(self) -> Tensor:
        """The loss: the mean square of each output, logits or maps, in float32."""
        return sum(y.float().square().mean() for y in tree_leaves(self._outputs()))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()

    def evaluate(self) -> None:
        with torch.no_grad():
            self._outputs()

    def _outputs(self):
        device = self.image.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.net(self.image)


def step_of(net: nn.Module, image: Tensor, run: argparse.Namespace) -> Step:
    """Of a network on the device, in the layout and in the dtype that were asked for."""
    layout = {"memory_format": LAYOUTS[run.layout]}
    return Step(net.to(run.device, **layout), image.to(run.device, **layout), DTYPES[run.dtype])
