"""Griffe extension: reStructuredText roles of docstrings become Markdown."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data):`~?(?:[\w.]*\.)?(\w+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_DISPLAY = re.compile(r"^\.\. math:: (.+(?:\n[ ]{4,}.+)*)", re.MULTILINE)
_TABLE = re.compile(r"^(=+(?: +=+)+)\n((?:.+\n)+)\1$", re.MULTILINE)
_CODE = re.compile(r"^(\w[^\n]*)::\n\n((?:[ ]{4}[^\n]*\n?|\n)+)", re.MULTILINE)


def to_markdown(text: str) -> str:
    r"""Math as LaTeX between brackets, roles as code, simple tables and ``name::`` blocks.

    Example:
        >>> to_markdown("the share :math:`d` of :class:`~a.b.Layer`")
        'the share \\(d\\) of `Layer`'
    """
    text = _DISPLAY.sub(lambda m: rf"\[{' '.join(m[1].split())}\]", text)
    text = _MATH.sub(lambda m: rf"\({' '.join(m[1].split())}\)", text)
    text = _ROLE.sub(r"`\1`", text)
    text = text.replace("\nExample:\n", "\nExamples:\n")  # the section that griffe knows
    text = _TABLE.sub(_table, text)
    return _CODE.sub(_fence, text)


def _table(match: re.Match[str]) -> str:
    starts = [column.start() for column in re.finditer("=+", match[1])]
    spans = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    rows: list[list[str]] = []
    for line in match[2].splitlines():
        cells = [line[span].strip() for span in spans]
        if cells[0]:
            rows.append(cells)
        else:  # goes on with the row above
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
    head = ["|" + " |" * len(spans), "|" + "---|" * len(spans)]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows])


def _fence(match: re.Match[str]) -> str:
    lines = [line[4:] for line in match[2].rstrip().splitlines()]
    return "\n".join([f"{match[1]}:", "", "```python", *lines, "```", ""])


class Markdown(griffe.Extension):
    """Rewrites every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One object was read."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
