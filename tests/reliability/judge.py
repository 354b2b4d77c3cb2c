"""A call is right, or refused by name; anything else is a fault."""

import inspect
import re
import signal
from collections import Counter
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
# A failing example is told as it was drawn: making it smaller takes minutes.
QUIET["phases"] = (Phase.explicit, Phase.generate)
SECONDS = 60  # of a call on tiny data, on a busy machine
COUNTS: dict[str, Counter] = {}


def count(function, outcome):
    COUNTS.setdefault(function, Counter())[outcome] += 1


@contextmanager
def in_time():
    """AssertionError where the block takes longer than SECONDS."""

    def stop(*_):
        raise AssertionError(f"hangs: not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(function, keywords, names, label=None):
    """(result, None), or (None, the refusal), which has to name one of `names`.

    Anything that is neither is raised as AssertionError.
    """
    label = label or function.__name__
    count(label, "calls")
    try:
        with in_time():
            return function(**keywords), None
    except (ValueError, TypeError) as error:
        refusal = error
    except AssertionError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"{label}: {type(error).__name__}: {str(error)[:600]}") from error
    text, kind = str(refusal), type(refusal).__name__
    named = any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)
    assert named, f"{label}: {kind} names none of {sorted(names)}: {text[:400]}"
    count(label, kind)
    return None, refusal


def parameters(function):
    return [n for n in inspect.signature(function).parameters if n not in ("self", "args")]
