"""Prints the table of features; with --check, after running every cell."""

import sys

from dynaconv.testing.features.page import page
from dynaconv.testing.features.registry import FEATURES, cases, check_feature


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--check"]):
        sys.exit(f"usage: python -m dynaconv.testing.features [--check], not {arguments}")
    for feature in FEATURES.values() if arguments else ():
        if feature.missing:
            sys.exit(f"{feature.name} needs {', '.join(feature.missing)}; pip install them")
        for cls, sample in cases():
            print(f"{feature.name}: {cls.__name__}", file=sys.stderr)
            check_feature(feature.name, cls, sample)
    print(page(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
