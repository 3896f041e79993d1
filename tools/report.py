"""
What the tools print and write, one definition each: tables as Markdown, as aligned text and as CSV.
"""
import csv
import io

from data import write_text


def markdown(columns, rows):
    """Lines of a Markdown table: columns, and the cells of every row, are texts."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def write_csv(path, columns, rows):
    """Write a table of numbers and texts to a file, atomically. Raises OSError if it can't."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())
