"""Figures and the results page are what the committed JSON gives."""

import report


def test_the_results_page_is_what_the_json_gives():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run python benchmarks/report.py"


def test_every_committed_figure_is_redrawn(tmp_path):
    drawn = {path.name for path in report.figures(tmp_path)}
    assert drawn == {path.name for path in report.RESULTS.glob("*.png")}
