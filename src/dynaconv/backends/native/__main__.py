"""`python -m dynaconv.backends.native`: builds the C++ library for this environment."""

import sys

from dynaconv.backends.native.build import BuildError, build

try:
    print(f"built {build()}")
except BuildError as error:
    sys.exit(f"cannot build: {error}")
