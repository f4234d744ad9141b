"""The dispatcher library: all operators are `torch.ops.revbifpn.*`."""

import torch

library = torch.library.Library("revbifpn", "DEF")
