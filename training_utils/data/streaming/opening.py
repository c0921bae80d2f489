"""Opening a dataset as a stream, without fetching it."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from training_utils.base.console import bar, say
from training_utils.base.errors import UserError, reason_of
from training_utils.cli import folders
from training_utils.cli.options import DataOptions
from training_utils.data import parallel, tables
from training_utils.data.files import IMAGE_ENDINGS, files_of
from training_utils.data.left_out import LeftOut
from training_utils.data.problems import Findings
from training_utils.data.streaming import chunks, parquet, remote, shards
from training_utils.data.streaming.chunks import Chunk, File, Listing, shown_bytes
from training_utils.data.streaming.dataset import StreamedDataset
from training_utils.data.streaming.source import Source
from training_utils.data.streaming.spool import cannot_be_kept, locked
from training_utils.data.wildcards import without_wildcards

LISTING_THREADS = 16  # that ask for files before the run; each of them waits for an answer
# Of what is remembered about a file; a listing of another format is made anew.
LISTING_FORMATS = {"tables": 1, "shards": 2}


def open_stream(options: DataOptions) -> StreamedDataset:
    """Open a dataset as `load_dataset` does, without fetching it; `options.shuffle_buffer` samples are shuffled
    together.

    What is found out about its files is remembered in the folder of downloads. Raises UserError.
    """
    assert options.shuffle_buffer is not None
    image_column = options.image_column
    caption_column = options.caption_column
    title = f"--train_data_dir {options.folder}"
    if options.dataset_name is not None:
        title = f"--dataset_name {options.dataset_name}"
    findings = Findings()
    urls, kind = _find_urls(title, options, findings.left_out)
    files = list(parallel.read_ahead(remote.find_file, urls, LISTING_THREADS))
    root = Path(folders.downloads(options.cache_dir)) / "text-to-image-streams"
    if kind == "tables":
        image_column, caption_column = parquet.find_columns(files[0], image_column, caption_column)
        columns = [column for column in (image_column, caption_column) if column is not None]
        lister = Lister(kind, columns, partial(parquet.list_table, columns=columns))
        listings = lister.list_files(files, root)
        fetch = partial(parquet.fetch_from_table, image_column=image_column, caption_column=caption_column)
    else:
        captioned = caption_column is not None
        wanted = ["captions"] if captioned else []
        wanted += sorted(IMAGE_ENDINGS)  # which depend on the plug-ins that are installed
        lister = Lister(kind, wanted, partial(shards.list_shard, captioned=captioned))
        listings = lister.list_files(files, root)
        apart = {
            (file.url, begin): elsewhere
            for file, listing in zip(files, listings)
            for begin, elsewhere in listing.apart.items()
        }
        fetch = partial(shards.fetch_from_shard, caption_column=caption_column, apart=apart)
    findings.images = sum(listing.images for listing in listings)
    findings.unnamed = [name for listing in listings for name in listing.uncaptioned]
    for listing in listings:
        findings.left_out.merge(listing.left_out)
    all_chunks = _number_chunks(listings)
    if not all_chunks:
        lack = "captions beside its images, in a .txt, .caption or .json" if findings.images else "images"
        raise UserError(findings.left_out.added_to(f"{title} holds no {lack}"))
    source = Source(files=files, chunks=all_chunks, fetch=fetch, root=root, buffer=options.shuffle_buffer)
    _refuse_full_disk(source, root)
    dataset = StreamedDataset(source, caption_column, findings)
    say(
        f"streaming {len(dataset):,} images in chunks, {source.describe_chunks()}; about "
        f"{shown_bytes(source.peak_bytes())} at most are in {root} at a time; captions and images are checked when "
        "their turn comes"
    )
    return dataset


def _number_chunks(listings: list[Listing]) -> list[Chunk]:
    """The chunks of all files, one after the other."""
    found = []
    for number, listing in enumerate(listings):
        first = 0
        for begin, end, rows, size in listing.chunks:
            found.append(Chunk(number, begin, end, rows, first, size))
            first += rows
    return found


def _refuse_full_disk(source: Source, root: Path) -> None:
    """Raises UserError where the chunks that are needed at the same time do not fit on the disk."""
    free = shutil.disk_usage(root).free
    peak = source.peak_bytes()
    if peak > free:
        raise UserError(
            f"the chunks that a stream needs at the same time take about {shown_bytes(peak)} in {root}, where "
            f"{shown_bytes(free)} are free; make room there, name another folder with --cache_dir, or lower "
            "--shuffle_buffer"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Which files
# ---------------------------------------------------------------------------------------------------------------------


def _find_urls(title: str, options: DataOptions, left_out: LeftOut) -> tuple[list[str], str]:
    """The addresses of the files of a dataset, paths or URLs, and "shards" or "tables"; what else a folder holds is
    added to `left_out`. Raises UserError."""
    config_name = options.config_name
    name = options.dataset_name or options.folder
    assert name is not None
    saved = Path(name, options.folder or "") if options.dataset_name else Path(name)
    if tables.is_saved_dataset(saved):
        raise UserError(f"{title} was written by save_to_disk and is read in place as it is; leave --streaming out")
    if options.dataset_name is None:
        assert options.folder is not None
        found, kind = files_of(Path(options.folder), left_out)
        if kind == "images":
            raise UserError(f"{title} holds single images, which are read in place as it is; leave --streaming out")
        if kind == "shards":
            return [os.path.realpath(path) for path in found], kind
        splits = _find_splits(title, str(options.folder), config_name, None, options.cache_dir)
    else:
        splits = _find_splits(title, options.dataset_name, config_name, options.folder, options.cache_dir)
    urls = [str(url) for url in tables.train_split(title, splits)]
    endings = {os.path.splitext(url)[1].lower() for url in urls}
    if endings == {".parquet"}:
        return urls, "tables"
    if endings == {".tar"}:
        return urls, "shards"
    raise UserError(
        f"{title} holds {', '.join(sorted(endings))} files, and --streaming reads .parquet tables or plain .tar "
        "shards; leave it out, or write the dataset again as one of them"
    )


def _find_splits(
    title: str, name: str, config_name: str | None, data_dir: str | Path | None, cache_dir: str | None
) -> dict[str, list]:
    """The addresses of a dataset's files by split, as the datasets library finds them. Raises UserError."""
    import datasets
    import yaml

    datasets.disable_progress_bars()
    path, data_dir = without_wildcards(name, data_dir, cache_dir)
    # Names and configurations that are not there, a README whose settings are broken, a hub that does not answer.
    what_bad_input_raises = (
        datasets.exceptions.DatasetsError,
        ValueError,
        yaml.YAMLError,
        *remote.network_errors(),
    )
    try:
        builder = datasets.load_dataset_builder(path, config_name, cache_dir=cache_dir, data_dir=data_dir)
    except what_bad_input_raises as error:
        raise UserError(f"{title} cannot be loaded: {reason_of(error).replace(path, name)}") from error
    splits = builder.config.data_files or {}
    if path == name:
        return splits
    # The library found links, made for this reading alone.
    return {split: [os.path.realpath(url) for url in urls] for split, urls in splits.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What is in them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lister:
    """Finds out what is in files of a `kind`, "shards" or "tables", and remembers it for later runs.

    `wanted` is whatever JSON can hold on which the listing depends; `list_file` makes one.
    """

    kind: str
    wanted: list[str]
    list_file: Callable[[File], Listing]

    def list_files(self, files: list[File], root: Path) -> list[Listing]:
        """The listings of files; those that are new are remembered in a folder in `root`. Raises UserError."""
        folder = root / "files"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = locked(root / "files.lock")
            lock.acquire()
        except OSError as error:
            raise cannot_be_kept(root, error, exit_code=2) from error
        # Under a lock: else each process of a machine would list all of them.
        try:
            listings = parallel.read_ahead(partial(self._list_once, folder), files, LISTING_THREADS)
            return list(bar(listings, self.kind, len(files)))
        finally:
            lock.release()

    def _list_once(self, folder: Path, file: File) -> Listing:
        """The listing of a file, from an earlier run where there is one."""
        words = json.dumps([LISTING_FORMATS[self.kind], chunks.CHUNK_BYTES, [self.kind, self.wanted], file])
        path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json"
        # One that is not there, or damaged, is made again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Listing.from_json(json.loads(path.read_text()))
        listing = self.list_file(file)
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
        try:
            unfinished.write_text(json.dumps(listing.as_json()))
            os.replace(unfinished, path)
        except OSError as error:
            raise cannot_be_kept(folder.parent, error, exit_code=2) from error
        return listing
