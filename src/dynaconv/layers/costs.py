"""What layers that choose their own amount of work report, for a regulariser."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_collecting: list[list[Tensor]] = []


@contextmanager
def collect_costs() -> Iterator[list[Tensor]]:
    """Inside, every layer whose work follows the input adds its share of the full work to the list.

    An adaptive stride adds the mean over the batch of prod(stride / s): 1 at first, 1 / 4 at twice
    the stride in 2-D. A gated convolution adds the share of positions whose gate is on. Both are
    differentiable.

    >>> with dynaconv.collect_costs() as costs:
    ...     output = model(x)
    >>> loss = criterion(output, y) + 0.1 * torch.stack(costs).mean()
    """
    costs: list[Tensor] = []
    _collecting.append(costs)
    try:
        yield costs
    finally:
        _collecting.pop()


def add_cost(cost: Callable[[], Tensor]) -> None:
    """Adds `cost()` where costs are being collected; it is not called otherwise."""
    for costs in _collecting:
        costs.append(cost())
