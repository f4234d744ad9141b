"""MBConvs of every kind, and what a training step of one gives."""

import copy
import functools

import torch
from torch import nn

from revbifpn_kernels import MBConv
from revbifpn_kernels.mbconv import transform

OPTIONS = {
    "plain": {},
    "expand": {"expand_ratio": 2.0},
    "squeeze-excite": {"se_ratio": 0.25},
    "all": {"expand_ratio": 2.0, "se_ratio": 0.25, "drop_path": 0.4},
    "large kernel": {"kernel_size": 5, "stride": 2, "se_ratio": 0.5, "act_layer": nn.SiLU},
    "larger kernel": {"kernel_size": 7, "stride": 4, "act_layer": nn.ReLU},
    "no activation": {"act_layer": nn.Identity},
    "no affine map": {
        "norm_layer": functools.partial(nn.BatchNorm2d, affine=False),
        "se_ratio": 0.5,
    },
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def make(options, dtype=torch.float64, channels=(16, 24)) -> MBConv:
    net = MBConv(*channels, **options).to(dtype)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return net


def image(dtype=torch.float64, layout=torch.contiguous_format, channels=16):
    return torch.randn(3, channels, 12, 10, dtype=dtype).to(memory_format=layout)


def results(net, x, context=None) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers of a step of a copy."""
    net = copy.deepcopy(net)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        y = net(x)
    (y.double() * (y.detach().double() + 1).cos()).sum().backward()
    named = {"output": y.detach(), "grad of the input": x.grad}
    named |= {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return named | dict(net.named_buffers())


def as_modules(monkeypatch, net, x, context=None):
    with monkeypatch.context() as patch:
        patch.setattr(transform, "can_run", lambda x: False)
        return results(net, x, context)
