"""
What the tools print and write, one definition each: tables as text, Markdown and CSV, and pictures
as SVG, in light and dark; and their loop over batches.
"""
import csv
import io
from html import escape

import numpy as np

from data import progress, write_text

# -----------------------------------------------------------------------------
# batches


def batches(items, size, label):
    """Yield items[:size], items[size:2 * size], ... of a list or an array, with progress."""
    for first in progress(range(0, len(items), size), desc=label, unit="batch"):
        yield items[first:first + size]


def duration(seconds):
    """Text of about so much time, as "40 seconds" or "3 minutes"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes"


# -----------------------------------------------------------------------------
# tables; columns and cells are texts


def markdown(columns, rows):
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def aligned(columns, rows):
    """Lines of a table for a terminal, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = []
    for name, *cells in (columns, *rows):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return lines


def write_csv(path, columns, rows):
    """Write a table of numbers and texts to a file, atomically. Raises OSError if it can't."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


# -----------------------------------------------------------------------------
# pictures

STYLE = (
    "text{fill:#222}svg{background:#fff}.grid{stroke:#8884}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}svg{background:#111}}"
)
BLUE, ORANGE = "#36c", "#d60"


def svg(width, height, parts):
    """A picture of parts, SVG elements as texts."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">')
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"])


def svg_text(x, y, words, anchor="start", colour=""):
    """anchor: what of the words stands at x, their "start", "middle" or "end"."""
    style = f' style="fill:{colour}"' if colour else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>'
            f"{escape(words)}</text>")


def svg_line(x1, y1, x2, y2, colour=""):
    """A line of the grid, or a thick one of a colour."""
    style = f'stroke="{colour}" stroke-width="2"' if colour else 'class="grid"'
    return f'<line {style} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def short(number):
    """Text of a number at an axis, as "1.5M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def line_chart(curves, caption):
    """Lines over common axes: curves {name: rows (x, y)}, x from 0; caption says what both are."""
    width, height, left, top, right, bottom = 760, 420, 60, 20, 200, 50
    rows = np.concatenate([np.asarray(curve, dtype=float) for curve in curves.values()])
    x_max = rows[:, 0].max()
    low, high = rows[:, 1].min(), rows[:, 1].max()

    def place(x, y):
        return (left + (width - left - right) * x / x_max,
                top + (height - top - bottom) * (high - y) / max(high - low, 1e-9))

    parts = []
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = place(x_max * share, low + (high - low) * share)
        parts += [
            svg_line(left, y, width - right, y),
            svg_text(left - 8, y + 4, short(low + (high - low) * share), "end"),
            svg_text(x, height - 32, short(x_max * share), "middle"),
        ]
    for i, (name, curve) in enumerate(curves.items()):
        colour = f"hsl({i * 360 / len(curves):.0f} 65% 48%)"
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*row) for row in curve))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            svg_text(width - right + 10, top + 12 + 16 * i, name[:34], colour=colour),
        ]
    return svg(width, height, [*parts, svg_text(left, height - 10, caption)])


def interval_chart(titles, rows):
    """
    Scores from 0 to 1 with their intervals, a line for each of rows and a panel for each of titles.

    rows: (name, whether it is to stand out, scores); a score is (mean, low, high), or None.
    """
    left, panel, gap, line, top = 260, 200, 30, 22, 60
    height = top + line * len(rows) + 20
    parts = []
    for number, title in enumerate(titles):
        x0 = left + number * (panel + gap)
        parts.append(svg_text(x0, 20, title))
        for share in (0, 0.5, 1):
            x = x0 + panel * share
            parts += [svg_line(x, top - 12, x, height - 20),
                      svg_text(x, top - 20, str(share), "middle")]
        for i, (_, stands_out, scores) in enumerate(rows):
            if scores[number] is None:
                continue
            y = top + line * i
            mean, low, high = x0 + panel * np.clip(scores[number], 0, 1)
            colour = ORANGE if stands_out else BLUE
            parts += [svg_line(low, y, high, y, colour),
                      f'<circle cx="{mean:.1f}" cy="{y}" r="4" fill="{colour}"/>']
    for i, (name, *_) in enumerate(rows):
        parts.append(svg_text(left - 12, top + line * i + 4, name, "end"))
    return svg(left + len(titles) * (panel + gap), height, parts)
