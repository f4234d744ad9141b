"""A training step that can be timed by its phases."""

import time

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .timing import Timing

PHASES = ("fwd", "bwd", "update")


def loss_of(outputs) -> Tensor:
    """The mean square of each output, logits or maps, in float32."""
    return sum(y.float().square().mean() for y in tree_leaves(outputs))


class Step:
    """Forward, backward and update by SGD with momentum; notes when each phase is over.

    The learning rate is 0: the same work, and weights that stay comparable.
    """

    def __init__(self, net: nn.Module, image: Tensor, autocast: torch.dtype | None = None) -> None:
        self.net, self.image, self.autocast = net.train(), image, autocast
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
        self.marks: list[list] = []

    def forward(self) -> Tensor:
        return loss_of(self._outputs())

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        marks = [self._mark()]
        loss = self.forward()
        marks.append(self._mark())
        loss.backward()
        marks.append(self._mark())
        self.optimizer.step()
        self.marks.append([*marks, self._mark()])

    def evaluate(self) -> None:
        with torch.no_grad():
            self._outputs()

    def phases(self) -> dict[str, Timing]:
        """Of all steps so far but the first, which warms up."""
        if self.image.is_cuda:
            torch.cuda.synchronize()
        times = [
            [_elapsed_ms(a, b) for a, b in zip(marks, marks[1:], strict=False)]
            for marks in self.marks[1:]
        ]
        return {
            phase: Timing.of(samples)
            for phase, samples in zip(PHASES, zip(*times, strict=True), strict=True)
        }

    def _outputs(self):
        device = self.image.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.net(self.image)

    def _mark(self):
        if not self.image.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed_ms(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)
