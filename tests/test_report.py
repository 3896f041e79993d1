"""report.py: nothing is lost between batches, a log hears of it, tables and pictures are whole."""
import csv
import xml.etree.ElementTree as ElementTree

import numpy as np

import data
from tools import report


def test_batches_are_everything_once_and_a_log_hears_of_them_now_and_then(monkeypatch, capfd):
    monkeypatch.setattr(data, "LOG_SECONDS", 0)
    items = np.arange(10).reshape(5, 2)
    np.testing.assert_array_equal(np.concatenate(list(report.batches(items, 2, "reading"))), items)
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("reading ") and "/3 [" in line for line in lines), lines
    monkeypatch.setattr(data, "LOG_SECONDS", 3600)
    assert list(report.batches([1, 2, 3], 2, "reading")) == [[1, 2], [3]]
    assert capfd.readouterr().err == ""


def test_tables(tmp_path):
    rows = [["a", "1"], ["long name", "1,000"]]
    lines = report.markdown(["", "n"], rows)
    assert lines[1:] == ["|---|---|", "| a | 1 |", "| long name | 1,000 |"]
    assert report.aligned(["", "n"], rows) == ["               n", "a              1",
                                               "long name  1,000"]
    report.write_csv(tmp_path / "table.csv", ["name", "n"], [["a, b", 1.5], ["c\nd", None]])
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.reader(file)) == [["name", "n"], ["a, b", "1.5"], ["c\nd", ""]]


def test_lines_are_where_their_points_are():
    tree = ElementTree.fromstring(report.line_chart({"<a>": [(0, 1.0), (10, 3.0)]}, "x & y"))
    (line,) = tree.iter("{http://www.w3.org/2000/svg}polyline")
    (x0, y0), (x1, y1) = [map(float, point.split(",")) for point in line.get("points").split()]
    assert x0 < x1 and y0 > y1  # to the right, and up
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a>", "x & y", "1", "3", "10"} <= set(texts)


def test_an_interval_beyond_the_panel_ends_at_its_edge():
    picture = report.interval_chart(["score"], [("a", True, [(0.5, -1.0, 2.0)]), ("b", 0, [None])])
    tree = ElementTree.fromstring(picture)
    lines = list(tree.iter("{http://www.w3.org/2000/svg}line"))
    grid = [float(line.get("x1")) for line in lines if line.get("class") == "grid"]
    (bar,) = [line for line in lines if line.get("class") is None]
    assert [float(bar.get("x1")), float(bar.get("x2"))] == [min(grid), max(grid)]
