"""The page: what was gathered about the runs, filled into templates/page.html."""

import base64
import hashlib
import shlex
import time
from pathlib import Path

from markupsafe import Markup

from tools.charts.drawing import CHART_CSS
from tools.charts.series import colour_class
from tools.report.contents import contents_of
from tools.report.curves import figures_of
from tools.report.folder import RunFolder
from tools.report.images import gallery_of
from tools.report.overview import comparison, description_of, numbers_of, state_of
from tools.report.settings import differing_settings
from tools.report.words import date
from tools.templates import template_environment

TEMPLATES = Path(__file__).parent / "templates"

_templates = template_environment(TEMPLATES)
_templates.filters["colour_class"] = colour_class


def render_page(runs: list[RunFolder]) -> str:
    """The page about these runs, as HTML."""
    now = time.time()
    script = _own_text("page.js")
    # No part of the page may be fetched, and no script may run but the page's own, whatever stands in a caption.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return _templates.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        policy=policy,
        css=CHART_CSS + _own_text("page.css"),
        script=script,
        runs=runs,
        states=[state_of(run, now) for run in runs],
        numbers=numbers_of(runs[0]),
        description={fact.label: fact.value for fact in description_of(runs[0])},
        comparison=comparison(runs, now),
        figures=figures_of(runs),
        no_validation=all(run.facts is not None and not run.facts.validation_images for run in runs),
        gallery=gallery_of(runs),
        differing=differing_settings(runs),
        contents=[contents_of(run) for run in runs],
        written=date(now),
        command=shlex.join(["python", "-m", "tools.report", *(str(run.path) for run in runs)]),
    )


def _own_text(name: str) -> Markup:
    """The text of a file beside the templates, which goes into the page as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))
