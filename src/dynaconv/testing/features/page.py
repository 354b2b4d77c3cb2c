"""The table of features as a page: a row a family, a column a feature."""

from dynaconv.registry import Family, families
from dynaconv.testing.features.registry import FEATURES, Feature

INTRODUCTION = """# Features

What `python -m dynaconv.testing.features` prints, and with `--check` runs first. Each cell is a
check that the tests run on every class of the family, 1-D to 3-D, transposed and causal forms too:
"yes" where all of them pass; otherwise what does not, with the reason below the table. Such a check
has to fail: a limit that is gone is an error as well."""


def page() -> str:
    """The table in Markdown, with the reasons below it."""
    reasons: list[str] = []
    titles = ["family", *(f.title for f in FEATURES.values())]
    lines = [titles, ["---"] * len(titles)]
    for family in families().values():
        cells = [_cell(family, feature, reasons) for feature in FEATURES.values()]
        lines.append([f"`{family.name}`", *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))
    return "\n\n".join(filter(None, [INTRODUCTION, table, notes])) + "\n"


def _cell(family: Family, feature: Feature, reasons: list[str]) -> str:
    """ "yes", "no" or "partly", the last two with the numbers of their reasons."""
    limited, total = [], 0
    for cls in family.all_classes:
        for arguments in cls.samples(cls.rank):
            total += 1
            reason = cls.limits(arguments).get(feature.name)
            limited += [] if reason is None else [reason]
    if not limited:
        return "yes"
    for reason in limited:
        if reason not in reasons:
            reasons.append(reason)
    numbers = sorted({reasons.index(reason) + 1 for reason in limited})
    word = "no" if len(limited) == total else "partly"
    return f"{word} ({', '.join(map(str, numbers))})"
