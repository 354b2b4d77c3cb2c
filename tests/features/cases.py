"""Parametrises a test over every class of every family."""

import pytest

from dynaconv.testing.features import FEATURES, cases


def over_families(feature, samples=1, ranks=(1, 2, 3)):
    """Decorator: (cls, arguments) of each class; skipped where the feature's packages are not."""
    missing = FEATURES[feature].missing
    skip = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
    found, parameters = {}, []
    for cls, arguments in cases(samples):
        i = found[cls] = found.get(cls, -1) + 1
        if cls.rank in ranks:
            parameters.append(pytest.param(cls, arguments, id=f"{cls.__name__}-{i}"))
    parametrised = pytest.mark.parametrize(("cls", "arguments"), parameters)
    return lambda test: skip(parametrised(test))
