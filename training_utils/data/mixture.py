"""Several datasets as one, as a YAML file names them: a list of sources, each a dict of the keys below.

    - path: photos                 # relative to the file; or else dataset_name, and dataset_config_name
      repeats: 10                  # how often an epoch shows each image; once, if left out
      caption_prefix: "a photo of "
    - dataset_name: lambdalabs/naruto-blip-captions
      image_column: image          # what the flags say, if left out
      caption_column: text

Instead of repeats all sources can have a `weight`: an epoch then has as many samples as there are images, and each
source's share of them is proportional to its weight.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training_utils.base.errors import UserError, reason_of
from training_utils.cli import paths
from training_utils.cli.options import DataOptions
from training_utils.cli.suggestion import suggestion
from training_utils.data.dataset import ImageDataset, Source
from training_utils.data.problems import Findings
from training_utils.data.single_source import load_source

TEXT_KEYS = ("path", "dataset_name", "dataset_config_name", "caption_prefix", "image_column", "caption_column")
KEYS = (*TEXT_KEYS, "repeats", "weight")


@dataclass(frozen=True)
class Part:
    """One of the datasets that are put together."""

    dataset: ImageDataset
    title: str
    repeats: int
    weight: float | None
    caption_prefix: str


def load_mixture(options: DataOptions) -> ImageDataset:
    """The samples of all sources that the file `options.config` names, one after the other; the columns of the options
    are those of sources that name none. Raises UserError that names file and source."""
    config = options.config
    assert config is not None
    parts = []
    for number, entry in enumerate(_entries(config), start=1):
        caption_column = None
        if options.caption_column is not None:
            caption_column = entry.get("caption_column", options.caption_column)
        folder = None
        if "path" in entry:
            folder = str(Path(config).parent / entry["path"])
        source = DataOptions(
            dataset_name=entry.get("dataset_name"),
            config_name=entry.get("dataset_config_name"),
            folder=folder,
            cache_dir=options.cache_dir,
            image_column=entry.get("image_column", options.image_column),
            caption_column=caption_column,
        )
        try:
            dataset = load_source(source)
        except UserError as error:
            raise UserError(f"{config} source {number}: {error}") from error
        title = entry.get("path") or entry["dataset_name"]
        prefix = entry.get("caption_prefix", "")
        parts.append(Part(dataset, title, entry.get("repeats", 1), entry.get("weight"), prefix))
    return _combined(parts)


def _entries(config: str | Path) -> list[dict[str, Any]]:
    """The sources in a file, each with valid keys and values."""
    import yaml

    try:
        entries = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        reason = getattr(error, "problem", None) or reason_of(error)
        raise UserError(f"{config} cannot be read as YAML{line}: {reason}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{config} is not a list of sources; each begins with `- path: FOLDER` or `- dataset_name: ID`"
        )
    weighted = [isinstance(entry, dict) and "weight" in entry for entry in entries]
    for number, entry in enumerate(entries, start=1):
        problem = _expand_paths(entry) or _problem(entry, Path(config).parent)
        if not problem and any(weighted) and not weighted[number - 1]:
            problem = "it has no weight; give all sources one, or none"
        if problem:
            raise UserError(f"{config} source {number}: {problem}")
    return entries


def _expand_paths(entry):
    """Put the home folder and the values of variables into the paths of a source. Returns what is wrong with them, or
    None."""
    try:
        for key in ("path", "dataset_name"):
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                entry[key] = paths.expand(entry[key])
    except ValueError as error:
        return f"{key}: {error}"
    return None


def _problem(entry, folder):
    """What is wrong with a source, as a clause, or None."""
    if not isinstance(entry, dict):
        return f"{entry!r:.60} is not a dict of keys and values like `path: FOLDER`"
    for key, value in entry.items():
        if key not in KEYS:
            return f"there is no key '{key}'" + suggestion(str(key), KEYS, quote="'")
        if key in TEXT_KEYS and (not isinstance(value, str) or not value):
            return f"{key} is {value!r:.60}, not text"
    if ("path" in entry) == ("dataset_name" in entry):
        return "give it a path or a dataset_name, one of the two"
    if "path" in entry and not os.path.isdir(folder / entry["path"]):
        return f"{folder / entry['path']} is not a folder"
    if "path" in entry and "dataset_config_name" in entry:
        return "dataset_config_name is for a dataset_name"
    if "repeats" in entry and "weight" in entry:
        return "repeats and weight both say how often it is shown; give one of them"
    repeats = entry.get("repeats", 1)
    weight = entry.get("weight", 1)
    if type(repeats) is not int or repeats < 1:
        return f"repeats is {repeats!r:.60}, not a whole number of at least 1; a weight may be any number"
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        return f"weight is {weight!r:.60}, not a number above 0"
    return None


def _combined(parts: list[Part]) -> ImageDataset:
    """One dataset of several. Its captions are lists where any of theirs is one, and it has none where one has
    none."""
    import datasets

    captioned = all(part.dataset.caption_column is not None for part in parts)
    captions = [_captions(part) for part in parts] if captioned else []
    lists = any(isinstance(caption, list) for texts in captions for caption in texts)
    kind = datasets.List(datasets.Value("string")) if lists else datasets.Value("string")
    tables, sources, origins = [], [], []
    findings = Findings()
    first_row = 0
    for number, part in enumerate(parts):
        dataset = part.dataset
        table = dataset.table.select_columns([dataset.image_column])
        table = table.rename_columns({dataset.image_column: "image"})
        if captioned:
            texts = captions[number]
            if lists:
                texts = [[text] if isinstance(text, str) else text for text in texts]
            table = table.add_column("text", texts, feature=kind)
        tables.append(table)
        source = Source(part.title, part.repeats, part.weight, first_row, is_folder=dataset.root is not None)
        sources.append(source)
        origins.append(np.full(len(dataset), number))
        first_row += len(dataset)
        findings.malformed += dataset.findings.malformed
        findings.problems += dataset.findings.problems
        findings.images += dataset.findings.images
        findings.unnamed += dataset.findings.unnamed
        findings.repeated_lines += dataset.findings.repeated_lines
        findings.left_out.merge(dataset.findings.left_out)
    roots = [part.dataset.root for part in parts]
    return ImageDataset(
        datasets.concatenate_datasets(tables),
        "image",
        "text" if captioned else None,
        None if None in roots else Path(os.path.commonpath(roots)),
        findings,
        sources=sources,
        origins=np.concatenate(origins),
    )


def _captions(part: Part) -> list[Any]:
    """The captions of a dataset behind their prefix. Raises UserError where they are not text, since no table can
    hold those beside text."""
    dataset = part.dataset
    captions = []
    for value in dataset.raw_captions():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str | None) for text in texts):
            raise UserError(f"--caption_column {dataset.caption_column} holds no text in {part.title}")
        prefixed = [text if text is None else part.caption_prefix + text for text in texts]
        captions.append(prefixed if isinstance(value, list) else prefixed[0])
    return captions
