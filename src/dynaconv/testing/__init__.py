"""What holds for every primitive and every family, as checks for anybody's backend or family.

dynaconv.testing.check_primitive("conv_per_position", "eager")
dynaconv.testing.check_family("odconv")
"""

from dynaconv.testing.families import CHECKS, check_family, checks
from dynaconv.testing.primitives import check_primitive, samples
from dynaconv.testing.tolerance import TOLERANCE, close

__all__ = ["CHECKS", "TOLERANCE", "check_family", "check_primitive", "checks", "close", "samples"]
