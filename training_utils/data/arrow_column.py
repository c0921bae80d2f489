"""A column of a table, read cell by cell where Arrow has it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

CELLS_AT_ONCE = 1000  # that are made Python objects together, where all of a column is read


class ArrowColumn(Sequence[Any]):
    """The cells of a column of a datasets.Dataset, or of some of its rows: `rows`, int64, by default all.

    The column that the dataset itself gives selects and copies anew at every access, over all chunks of the table:
    one cell takes a thousand times as long in a table of a million rows.
    """

    def __init__(self, table: "datasets.Dataset", name: str, rows: np.ndarray | None = None) -> None:
        self.table = table
        self.name = name
        self.data = table.data.column(name)
        self.rows = np.arange(len(table)) if rows is None else rows
        self._arguments = (table, name, rows)
        # A table that was shuffled or selected has all its rows still, and a list of those that count.
        if table._indices is not None:
            self.rows = table._indices.column(0).to_numpy()[self.rows].astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        # The table is pickled as the path of its file where it has one; Arrow's column would be copied.
        return ArrowColumn, self._arguments

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The cell of a row. Arrow finds its chunk by bisection."""
        return self._decoded([self.cell(index).as_py()])[0]

    def __iter__(self) -> Iterator[Any]:
        for begin in range(0, len(self), CELLS_AT_ONCE):
            rows = self.rows[begin : begin + CELLS_AT_ONCE]
            if len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all():
                yield from self._decoded(self.data.slice(rows[0], len(rows)).to_pylist())
            else:
                yield from (self[index] for index in range(begin, begin + len(rows)))

    def cell(self, index: int) -> Any:
        """The cell of a row as Arrow has it, a scalar: nothing is copied."""
        return self.data[int(self.rows[index])]

    def is_null(self, field: str | None = None) -> np.ndarray:
        """Whether the cell of each row is null, or in a column of structs their `field`: bool, shape (N,)."""
        parts = [(chunk if field is None else chunk.field(field)).is_null() for chunk in self.data.chunks]
        return self._of_rows([part.to_numpy(False) for part in parts], bool)

    def field(self, name: str) -> np.ndarray:
        """What each row of a column of structs has in a field: shape (N,)."""
        return self._of_rows([chunk.field(name).to_numpy(False) for chunk in self.data.chunks], object)

    def _of_rows(self, parts: list[np.ndarray], kind: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, kind), *parts])[self.rows]

    def _decoded(self, cells: list[Any]) -> list[Any]:
        """The values of cells that the library encodes, such as JSON."""
        return self.table.features.decode_column(cells, self.name)
