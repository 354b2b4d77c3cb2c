"""`python -m dynaconv.backends.native`: builds the C++ library for this environment."""

import sys

from dynaconv.backends.native.build import CannotBuild, build

try:
    print(f"built {build()}")
except CannotBuild as error:
    sys.exit(f"cannot build: {error}")
