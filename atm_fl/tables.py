"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]], rule: str = "|---") -> str:
    """A Markdown table; cells are taken as they are. rule: of the columns after the first, `|---:` is right-aligned."""
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in map(list, (head, *rows)))
    return "\n".join([first, "|---" + rule * (len(list(head)) - 1) + "|", *rest])
