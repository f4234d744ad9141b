"""A RevBiFPN small enough for tests of everything but its size."""

from revbifpn_kernels import Config, RevBiFPN

WIDTHS = (48, 16, 32, 16)
NECK_WIDTHS = (16, 32, 16, 48)


def tiny(*, reversible: bool = True, **options) -> RevBiFPN:
    numbers = {
        "widths": WIDTHS,
        "neck_widths": NECK_WIDTHS,
        "features": 24,
        "extra_silos": 1,
        "resolution": 64,
        "num_classes": 10,
    }
    return RevBiFPN(Config(**numbers | options), reversible=reversible)


TWO_LEVELS = {
    "widths": (48, 16),
    "neck_widths": (16, 32),
    "kernels": (3, 5),
    "extra_kernels": (0, 2),
    "expand_ratios": (1, 2),
    "se_ratios": (0.25, 0.0),
    "neck_expand_ratios": (1, 2),
    "neck_se_ratios": (0.25, 0.125),
}
