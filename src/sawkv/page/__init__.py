"""Pages of a single HTML file without scripts, fonts or network. Reports of the lab and of `sawkv bench` are such
pages.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: as shown.
        value: for CSV; None is the text.
        soft: shown after the text in a fainter colour, such as an error.
        at: 0 to 1, place of a dot on the column's scale; None draws no scale.
    """

    text: str
    value: float | str | None = None
    soft: str = ""
    at: float | None = None


@dataclass(frozen=True)
class Column:
    """One column. Narrow screens leave out `minor` columns; CSV and Markdown leave out `drawn` ones."""

    title: str
    minor: bool = False
    drawn: bool = False


@dataclass(frozen=True)
class Table:
    """A table that readers can save as CSV and Markdown.

    Attributes:
        name: of the saved file, without suffix.
        columns: first to last.
        rows: cells of each row.
        styles: a CSS class per row, or "".
        decades: of the scale in drawn columns.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    styles: Sequence[str] = ()
    decades: float = 1.0

    @property
    def css(self) -> str:
        return f"--decades: {max(self.decades, 1.0):.3g}"

    def style(self, row: int) -> str:
        return self.styles[row] if self.styles else ""

    def csv(self) -> str:
        """CSV with full numbers. `soft` texts have a column of their own."""
        header, columns = [], []
        for i, column in enumerate(self.columns):
            if column.drawn:
                continue
            cells = [row[i] for row in self.rows]
            header.append(column.title)
            columns.append([_plain(cell.text if cell.value is None else cell.value) for cell in cells])
            if any(cell.soft for cell in cells):
                header.append(f"{column.title} ±" if any("±" in cell.soft for cell in cells) else f"{column.title}, p")
                columns.append([cell.soft.removeprefix("± ") for cell in cells])
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([header, *zip(*columns, strict=True)])
        return out.getvalue()

    def markdown(self) -> str:
        """Markdown, as shown."""
        kept = [i for i, column in enumerate(self.columns) if not column.drawn]
        rows = [[self.columns[i].title for i in kept], ["-"] * len(kept)]
        rows += [[f"{row[i].text} {row[i].soft}".strip() for i in kept] for row in self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _plain(value: float | str) -> float | str:
    """Protect a name from being read as a formula by a spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def render(package: str, template: str, **context: Any) -> str:
    """Render a template of `package`, which may use templates of this package. Values that are not `Markup` are
    escaped.

    Args:
        package: the Python package that has the template beside its modules.
        template: the file's name.
        context: values for the template. A missing value is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("sawkv.page", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data": data_url, "prose": prose}
    sheets = "".join(
        resources.files("sawkv.page").joinpath(name).read_text(encoding="utf-8") for name in ("plots.css", "page.css")
    )
    return environment.get_template(template).render(style=Markup(sheets), **context) + "\n"


def data_url(text: str, kind: str) -> str:
    """A file as a link, which can be saved without script and network."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def prose(text: str) -> Markup:
    """Text as HTML, with `backquotes` marking code."""
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(text))))


WIDE, NARROW = 900, 366
"""Width of drawings in pixels on a desktop and on a phone."""


def both(draw: Callable[[int], str]) -> Markup:
    """One drawing for wide screens and one for narrow ones. `draw` takes the width. Wider drawings scroll."""
    return Markup(
        "".join(
            f'<div class="scroll {name}">{draw(width)}</div>' for name, width in (("wide", WIDE), ("narrow", NARROW))
        )
    )


def digits(value: float, count: int = 3) -> str:
    """`count` significant digits, without an exponent down to 1e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-6:
        return f"{value:.{count - 1}e}"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


def with_error(mean: float, error: float) -> tuple[str, str]:
    """Mean and error as text, such as `0.0210` and `± 0.0008`, with the same last place."""
    shown = digits(mean)
    if error <= 0 or "e" in shown:
        return shown, ""
    return shown, f"± {error:.{len(shown.partition('.')[2])}f}"
