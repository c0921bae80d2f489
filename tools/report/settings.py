"""The settings that shape the result: all of one run, those that differ of several."""

from tools.report.folder import RunFolder
from tools.report.table import Cell, Row


def differing_settings(runs: list[RunFolder]) -> list[Row]:
    """A row for each setting in which the runs differ."""
    settings = [run.shaping_settings() for run in runs]
    rows: list[Row] = []
    for name in dict.fromkeys(name for given in settings for name in given):
        if len({str(given.get(name)) for given in settings}) > 1:
            rows.append(Row(name, [Cell(str(given.get(name, "–"))) for given in settings]))
    return rows
