"""Several datasets as one, as a YAML file names them: a list of sources, each a dict of the keys below.

    - path: photos                 # relative to the file; or else dataset_name, and dataset_config_name
      repeats: 10                  # times that an epoch shows each image; left out, once
      caption_prefix: "a photo of "
    - dataset_name: lambdalabs/naruto-blip-captions
      image_column: image          # left out, what the flags say
      caption_column: text

Instead of repeats all sources can have a `weight`: an epoch then has as many samples as there are images, of which
each source has a share proportional to it.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from training_utils.base.errors import UserError, reason_of
from training_utils.cli.options import DataOptions
from training_utils.cli.suggestion import suggestion
from training_utils.data import opening
from training_utils.data.dataset import ImageDataset, Source
from training_utils.data.problems import Findings

TEXTS = ("path", "dataset_name", "dataset_config_name", "caption_prefix", "image_column", "caption_column")
KEYS = (*TEXTS, "repeats", "weight")


def load_rows(config, cache_dir, image_column, caption_column):
    """The rows of all sources that a file names, one after the other. Raises UserError that names file and source."""
    parts = []
    for number, entry in enumerate(_entries(config), start=1):
        prefix = entry.get("caption_prefix", "")
        try:
            options = DataOptions(
                dataset_name=entry.get("dataset_name"),
                config_name=entry.get("dataset_config_name"),
                folder=Path(config).parent / entry["path"] if "path" in entry else None,
                cache_dir=cache_dir,
                image_column=entry.get("image_column", image_column),
                caption_column=None if caption_column is None else entry.get("caption_column", caption_column),
            )
            rows = opening.load_dataset(options)
        except UserError as error:
            raise UserError(f"{config} source {number}: {error}") from None
        title = entry.get("path") or entry["dataset_name"]
        source = Source(title, entry.get("repeats", 1), entry.get("weight"))
        parts.append((rows, source, prefix))
    return _combined(parts)


def _entries(config):
    """The sources in a file, a list of dicts that are right in themselves."""
    import yaml

    try:
        entries = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}"
        raise UserError(
            f"{config} cannot be read as YAML{place}: {getattr(error, 'problem', None) or reason_of(error)}"
        ) from None
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{config} is not a list of sources; each begins with `- path: FOLDER` or `- dataset_name: ID`"
        )
    weighted = [isinstance(entry, dict) and "weight" in entry for entry in entries]
    for number, entry in enumerate(entries, start=1):
        problem = _problem(entry, Path(config).parent)
        if not problem and any(weighted) and not weighted[number - 1]:
            problem = "it has no weight; give all sources one, or none"
        if problem:
            raise UserError(f"{config} source {number}: {problem}")
    return entries


def _problem(entry, folder):
    """What is wrong with a source, as a clause, or None."""
    if not isinstance(entry, dict):
        return f"{entry!r:.60} is no dict of keys and values like `path: FOLDER`"
    for key, value in entry.items():
        if key not in KEYS:
            return f"there is no key '{key}'" + suggestion(str(key), KEYS, quote="'")
        if key in TEXTS and (not isinstance(value, str) or not value):
            return f"{key} is {value!r:.60}, not text"
    if ("path" in entry) == ("dataset_name" in entry):
        return "give it a path or a dataset_name, one of the two"
    if "path" in entry and not os.path.isdir(folder / entry["path"]):
        return f"{folder / entry['path']} is not a folder"
    if "path" in entry and "dataset_config_name" in entry:
        return "dataset_config_name is for a dataset_name"
    if "repeats" in entry and "weight" in entry:
        return "repeats and weight both say how often it is shown; give one of them"
    repeats, weight = entry.get("repeats", 1), entry.get("weight", 1)
    if type(repeats) is not int or repeats < 1:
        return f"repeats is {repeats!r:.60}, not a whole number of at least 1; a weight may be any number"
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        return f"weight is {weight!r:.60}, not a number above 0"
    return None


def _combined(parts):
    """Rows of several (Rows, Source, prefix of the captions)."""
    import datasets

    captioned = all(rows.caption_column is not None for rows, _, _ in parts)
    captions = [_captions(rows, prefix) for rows, _, prefix in parts] if captioned else []
    lists = any(isinstance(caption, list) for texts in captions for caption in texts)
    kind = datasets.List(datasets.Value("string")) if lists else datasets.Value("string")
    tables, sources, origins = [], [], []
    for at, (rows, source, _) in enumerate(parts):
        table = rows.dataset.select_columns([rows.image_column]).rename_columns({rows.image_column: "image"})
        if captioned:
            texts = [[text] if isinstance(text, str) else text for text in captions[at]] if lists else captions[at]
            table = table.add_column("text", texts, feature=kind)
        sources.append(replace(source, start=sum(map(len, origins))))
        origins.append(np.full(len(rows), at))
        tables.append(table)
    findings = Findings()
    for rows, _, _ in parts:
        for name in ("malformed", "problems", "images", "unnamed", "repeats"):
            setattr(findings, name, getattr(findings, name) + getattr(rows.findings, name))
    roots = [rows.root for rows, _, _ in parts]
    return ImageDataset(
        datasets.concatenate_datasets(tables),
        "image",
        "text" if captioned else None,
        None if None in roots else Path(os.path.commonpath(roots)),
        findings,
        sources=sources,
        origins=np.concatenate(origins),
    )


def _captions(rows, prefix):
    """The captions of rows behind a prefix. Raises UserError, as no table can hold them, where they are no text."""
    texts = list(rows.dataset[rows.caption_column])
    if not all(isinstance(one, str | None) for text in texts for one in (text if isinstance(text, list) else [text])):
        raise UserError(f"--caption_column {rows.caption_column} holds no text in {rows.root or 'a data set'}")

    def behind(text):
        return prefix + text if isinstance(text, str) else text

    return [[behind(one) for one in text] if isinstance(text, list) else behind(text) for text in texts]
