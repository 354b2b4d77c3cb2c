"""The page of the text demo: the tables, and what the kernels did along one text."""

from pathlib import Path

from dynaconv.data.phrases import LANGUAGES, LENGTH_BUCKETS
from dynaconv.data.text import Texts
from dynaconv.registry import families
from dynaconv.training.model import STATIC
from dynaconv.training.report import best_of, image_html, paragraph, table_html, won, write_page
from dynaconv.training.text_demo import TextResult, promise, rows
from dynaconv.training.text_model import TextConfig
from dynaconv.training.text_pictures import any_characters, draw_text_kernels

TITLE = "Static and dynamic convolution on texts of any length"
LEAD = (
    "The task: which language is it? Real phrases of {languages} languages in one script, names "
    "of territories, languages and currencies, 3 to 200 characters. No phrase of validation is "
    "the translation of one in training. Each row is the same small network with the same start, "
    "texts and schedule; only the kind of its convolutions differs."
)
TABLE_NOTE = (
    "accuracy: the share of texts whose language is right. short, medium, long: the same for texts "
    "of {lengths} characters. ± is the standard deviation over seeds. params: numbers to learn. "
    "ms/text: time on this machine for one text of middle length."
)
PROMISE_NOTE = (
    "Each validation text alone, and the same text in a padded batch among others of all lengths: "
    "for how many the label is the same, and by how much the numbers before the softmax differ."
)
KERNELS_NOTE = "What the kernels of the first and the last layer did along “{text}” ({label})."


def write_text_report(
    path: Path, results: list[TextResult], config: TextConfig, val: Texts, about: str
) -> None:
    """Writes the page, whole or not at all."""
    lengths = ", ".join(f"{low}-{high - 1}" for low, high in LENGTH_BUCKETS.values())
    reached = {result.layer: result.accuracy for result in results}
    picked = min(range(len(val)), key=lambda i: abs(len(val.texts[i]) - 50))
    text, label = val.texts[picked], val.labels[picked]
    parts = [
        paragraph(LEAD.format(languages=len(LANGUAGES))),
        paragraph(won("accuracy", reached), "best"),
        table_html(rows(results), best_of(reached)),
        paragraph(TABLE_NOTE.format(lengths=lengths), "note"),
        table_html(promise(results, len(val))),
        paragraph(PROMISE_NOTE, "note"),
        paragraph(f"This run: {about}.", "note"),
        "<h2>What the kernels did</h2>",
        paragraph(KERNELS_NOTE.format(text=text, label=label)),
    ]
    for result in results:
        if result.layer != STATIC:
            parts.append(paragraph(f"{result.layer}: {families()[result.layer].summary}"))
            with any_characters():
                figure = draw_text_kernels(result.models[0], config, text, most=2)
                parts.append(image_html(figure, f"kernels of {result.layer} along a text"))
    write_page(path, TITLE, parts)
