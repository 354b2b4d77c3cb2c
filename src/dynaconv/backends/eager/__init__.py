"""Fast ATen: one operator a primitive, whose formulation is chosen by a written cost rule."""

from dynaconv.backends.eager.conv import conv
from dynaconv.backends.eager.conv_mixture import conv_mixture
from dynaconv.backends.eager.conv_per_position import conv_per_position
from dynaconv.backends.eager.conv_per_sample import conv_per_sample
from dynaconv.backends.eager.deform_conv import deform_conv
from dynaconv.backends.reference import conv_transpose_per_sample, deform_conv_transpose
from dynaconv.dispatch import Backend, Problem, register_backend


def supports(problem: Problem) -> str | None:
    """Everything but what wants plain ATen operators: export, and torch.func's gradients.

    conv has plain ATen operators for both itself.
    """
    if problem.primitive == "conv":
        return None
    if problem.exporting:
        return "torch.export is given plain ATen operators: the reference"
    if problem.transformed:
        return "torch.func's gradients go through plain ATen operators: the reference"
    return None


# The transposed ones are library calls as they stand.
FUNCTIONS = (
    *(conv, conv_per_sample, conv_mixture, conv_per_position, deform_conv),
    *(conv_transpose_per_sample, deform_conv_transpose),
)
register_backend(Backend("eager", supports, {f.__name__: f for f in FUNCTIONS}))
