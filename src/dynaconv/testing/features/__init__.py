"""What a trained layer needs to run elsewhere: one check a feature, for any class of any family.

    dynaconv.testing.features.check_feature("compile", dynaconv.ODConv2d, arguments)

A file here enrols its checks with `@feature`. A family is covered by being registered; what it
cannot do, `limits` of its class says with the reason, and then the check has to fail.
"""

from dynaconv.testing.features import compile as compile
from dynaconv.testing.features import export as export
from dynaconv.testing.features import onnx as onnx
from dynaconv.testing.features import transforms as transforms
from dynaconv.testing.features.registry import (
    FEATURES,
    Feature,
    cases,
    check_feature,
    feature,
    outcome,
)

__all__ = ["FEATURES", "Feature", "cases", "check_feature", "feature", "outcome"]
