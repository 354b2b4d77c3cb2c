"""What is computed: the primitives, n-d by the rank of the input."""

from dynaconv.functional.conv_mixture import conv_mixture
from dynaconv.functional.conv_per_position import conv_per_position
from dynaconv.functional.conv_per_sample import conv_per_sample
from dynaconv.functional.deform_conv import deform_conv

__all__ = ["conv_mixture", "conv_per_position", "conv_per_sample", "deform_conv"]
