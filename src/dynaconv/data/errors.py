"""The one error of the application that its user can mend."""

from collections.abc import Iterable

# Files with hundreds of faults are told with the first few.
MOST_FAULTS = 20


class InputError(ValueError):
    """A file or an option will not do; the text names it, and the commands print it as it is."""


def refuse(faults: Iterable[str]) -> None:
    """InputError that tells the faults, a line each, if there are any."""
    told = list(faults)
    if told:
        more = len(told) - MOST_FAULTS
        rest = [f"... and {more} more"] if more > 0 else []
        raise InputError("\n".join(told[:MOST_FAULTS] + rest))
