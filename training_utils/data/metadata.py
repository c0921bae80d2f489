"""Reading the metadata of a folder: metadata.jsonl, metadata.csv and metadata.parquet, entry by entry."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training_utils.base.errors import reason_of
from training_utils.base.formats import cut, shortened

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_text(path: Path, malformed: list[str]) -> str | None:
    """The text of a file, or None, and the reason among `malformed`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        malformed.append(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        malformed.append(f"{path} cannot be read: {error.strerror}")
    return None


def read_metadata(path: Path, malformed: list[str]) -> Iterator[tuple[int, Any]]:
    """(line number, entry) for each line of a metadata.jsonl or metadata.csv that can be read, or (row number, from
    0, entry) for each row of a metadata.parquet; adds to `malformed`."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, malformed)
        return
    text = read_text(path, malformed) or ""
    read = _read_csv if path.suffix == ".csv" else _read_json_lines
    yield from read(path, text, malformed)


def _read_csv(path, text, malformed):
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if header and "file_name" not in header:
            hint = "; columns are to be separated by commas" if set(";\t") & set(header[0]) else ""
            have = f"only {shortened([cut(name) for name in header])}{hint}"
            malformed.append(f'{path} has no column "file_name", which names the images, {have}')
            return
        for row in reader:
            if None in row:
                malformed.append(
                    f"{path} line {reader.line_num} has more fields than the header; quote commas in captions"
                )
            else:
                yield reader.line_num, row
    except csv.Error as error:
        malformed.append(f"{path} is not CSV after line {reader.line_num}: {error}")


def _read_json_lines(path, text, malformed):
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028
        if content.strip():
            try:
                entry = json.loads(content)
            except json.JSONDecodeError as error:
                malformed.append(f"{path} line {line} is not JSON: {error.msg} at column {error.colno}")
            except (RecursionError, ValueError) as error:  # brackets without end, a number of thousands of digits
                malformed.append(f"{path} line {line} cannot be read: {error}")
            else:
                yield line, entry


def _read_parquet(path, malformed):
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for entry in batch.to_pylist():
                    yield row, entry
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        place = f" from row {row} on" if row else ""
        malformed.append(f"{path} cannot be read as parquet{place}: {reason_of(error)}")
