"""Templates and the files beside them: where the programs in tools/ keep their HTML, SVG, CSS and JavaScript."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def template_environment(folder: Path) -> Environment:
    """The templates in a folder. All of them escape what is filled in, whatever their file is called."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
