"""How a figure stands in a table."""

from collections.abc import Iterable


def figure(value: float | None, digits: int) -> str:
    """With so many digits after the point; nothing for what was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def percentages(densities: Iterable[float]) -> str:
    """Several shares in one cell."""
    return " / ".join(f"{100 * density:.0f}" for density in densities) + "%"


def percent(value: float | None) -> str:
    """A share; nothing for what was not measured."""
    return "" if value is None else f"{value:.1%}"


def markdown_table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Rows of cells as Markdown has them."""
    head = list(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
