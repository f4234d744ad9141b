"""Squeeze-excite's gates, their gradient, and the gradient of a norm that they gate."""

from . import gates, norm_act_excite_grad, norm_act_gates  # noqa: F401  (registers their ops)
