"""What is computed: the primitives, n-d by the rank of the input."""

from dynaconv.functional.conv import conv
from dynaconv.functional.conv_mixture import conv_mixture
from dynaconv.functional.conv_on_grid import conv_on_grid
from dynaconv.functional.conv_per_position import conv_per_position
from dynaconv.functional.conv_per_sample import conv_per_sample
from dynaconv.functional.conv_transpose_per_sample import conv_transpose_per_sample
from dynaconv.functional.deform_conv import deform_conv
from dynaconv.functional.deform_conv_transpose import deform_conv_transpose
from dynaconv.functional.resample_kernel import resample_kernel
from dynaconv.functional.spectral_resize import spectral_resize

__all__ = [
    "conv",
    "conv_mixture",
    "conv_on_grid",
    "conv_per_position",
    "conv_per_sample",
    "conv_transpose_per_sample",
    "deform_conv",
    "deform_conv_transpose",
    "resample_kernel",
    "spectral_resize",
]
