"""Griffe extension: reStructuredText roles of docstrings become Markdown."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data):`~?(?:[\w.]*\.)?(\w+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_DISPLAY = re.compile(r"^\.\. math:: (.+(?:\n[ ]{4,}.+)*)", re.MULTILINE)
_CODE = re.compile(r"^(\w[^\n]*)::\n\n((?:[ ]{4}[^\n]*\n?|\n)+)", re.MULTILINE)


def to_markdown(text: str) -> str:
    r"""Math as LaTeX between brackets, roles as code, ``name::`` blocks as fences.

    Example:
        >>> to_markdown("the share :math:`d` of :class:`~a.b.Layer`")
        'the share \\(d\\) of `Layer`'
    """
    text = _DISPLAY.sub(lambda m: rf"\[{' '.join(m[1].split())}\]", text)
    text = _MATH.sub(lambda m: rf"\({' '.join(m[1].split())}\)", text)
    text = _ROLE.sub(r"`\1`", text)
    text = text.replace("\nExample:\n", "\nExamples:\n")  # the section that griffe knows
    return _CODE.sub(_fence, text)


def _fence(match: re.Match[str]) -> str:
    lines = [line[4:] for line in match[2].rstrip().splitlines()]
    return "\n".join([f"{match[1]}:", "", "```python", *lines, "```", ""])


class Markdown(griffe.Extension):
    """Rewrites every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One object was read."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
