"""Parquet tables of a stream: their footers, and their row groups, fetched by chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import pyarrow

from training_utils.base.errors import UserError, reason_of
from training_utils.base.formats import cut
from training_utils.data import tables
from training_utils.data.streaming import chunks, remote
from training_utils.data.streaming.chunks import Chunk, ChunkContent, File, Listing

if TYPE_CHECKING:  # it takes a while to import
    from pyarrow.parquet import FileMetaData, RowGroupMetaData


@lru_cache(maxsize=64)
def read_footer(file: File) -> FileMetaData:
    """The metadata of a table. Raises UserError."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(remote.RemoteFile(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.shown} cannot be read as parquet: {reason_of(error)}") from error


def find_columns(file: File, image_column: str, caption_column: str | None) -> tuple[str, str | None]:
    """The columns of images and of captions in a table, found as in tables that are not streamed. Raises UserError."""
    schema = read_footer(file).schema.to_arrow_schema()
    image_column, caption_column = tables.columns_of(schema.names, image_column, caption_column)
    kind = schema.field(image_column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise UserError(
            f"--image_column {image_column} holds {cut(kind)}, not images; there are "
            f"{tables.shown_columns(schema.names)}"
        )
    return image_column, caption_column


def list_table(file: File, *, columns: list[str]) -> Listing:
    """What the footer of a table says of its row groups; their sizes are those of the columns. Raises UserError."""
    metadata = read_footer(file)
    missing = set(columns) - set(metadata.schema.to_arrow_schema().names)
    if missing:
        raise UserError(f"{file.shown} has no column '{min(missing)}', as other tables of this dataset have")
    found: list[list[int]] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(end - begin for begin, end in _column_ranges(group, columns))
        if found and found[-1][3] + size <= chunks.CHUNK_BYTES:
            begin, _, rows, bytes_before = found.pop()
        else:
            begin, rows, bytes_before = number, 0, 0
        found.append([begin, number + 1, rows + group.num_rows, bytes_before + size])
    return Listing(chunks=[chunk for chunk in found if chunk[2]], images=metadata.num_rows)


def fetch_from_table(file: File, chunk: Chunk, *, image_column: str, caption_column: str | None) -> ChunkContent:
    """Fetch a chunk of a table. Raises UserError."""
    import pyarrow.compute
    import pyarrow.parquet

    metadata = read_footer(file)
    groups = list(range(chunk.begin, chunk.end))
    columns = [name for name in (image_column, caption_column) if name]
    ranges = _merged_ranges(metadata, groups, columns)
    parts = [(begin, remote.read_bytes(file, begin, end)) for begin, end in ranges]
    content = remote.RemoteFile(file, parts)
    try:
        with pyarrow.parquet.ParquetFile(content, metadata=metadata, pre_buffer=False) as parquet:
            table = parquet.read_row_groups(groups, columns=columns, use_threads=False)
        images = table[image_column]
        if pyarrow.types.is_struct(images.type):
            images = pyarrow.compute.struct_field(images, "bytes")
        images = pyarrow.concat_arrays(images.cast(pyarrow.large_binary()).chunks)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file.shown} cannot be read as parquet from row {chunk.first} on: {reason_of(error)}", exit_code=1
        ) from error
    captions = None
    if caption_column is not None:
        captions = [json.dumps([value], default=repr) for value in table[caption_column].to_pylist()]
    return ChunkContent(images=images, captions=captions, names=None)


def _column_ranges(group: RowGroupMetaData, columns: list[str]) -> Iterator[tuple[int, int]]:
    """The bytes of columns in a row group, from the first to before the second."""
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        begin = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            begin = min(begin, column.dictionary_page_offset)
        yield begin, begin + column.total_compressed_size


def _merged_ranges(metadata: FileMetaData, groups: list[int], columns: list[str]) -> list[tuple[int, int]]:
    """The bytes of columns in row groups, as ranges; those that lie near each other are merged into one."""
    wanted = sorted(pair for number in groups for pair in _column_ranges(metadata.row_group(number), columns))
    merged: list[tuple[int, int]] = []
    for begin, end in wanted:
        if merged and begin - merged[-1][1] <= remote.MIN_READ_BYTES:
            begin = merged.pop()[0]
        merged.append((begin, end))
    return merged
