"""What the throughput benchmark reports, as dicts and as Markdown."""

from statistics import median

from bench_goals import building, over_bare
from bench_runs import FAMILIES, TITLES


def summary(run, plain, flop, frozen_flop, peak_flops):
    """What is reported of a Run, as JSON holds it; `plain` is the run it is compared with, or None."""
    work = flop + (0 if run.cached else frozen_flop)
    speed = run.batch / median(run.step)
    over_plain = None
    if plain is not None and not plain.failed:
        over_plain = median(before / now for now, before in zip(run.step, plain.step))
    outside = None
    if run.bare:
        outside = median(1 - bare / step for step, bare in zip(run.step, run.bare))
    return {
        "script": f"{run.script}.py",
        "batch": run.batch,
        "images per second": speed,
        "over plain": over_plain,
        "step": run.step,
        "bare": run.bare,
        "outside": outside,
        "peak": run.peak,
        "mfu": speed * work / peak_flops if peak_flops else None,
    }


def table(results):
    """The results as Markdown: a table of the runs and one of the families."""
    families = [family for family in FAMILIES if family in results]
    lines = [
        "| | run | batch | images/s | over plain | seconds a step | outside the network | over the bare step "
        "| peak memory, GB | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in families:
        lines += [_row(_run_cells(family, name, results)) for name in results[family]["runs"]]
    lines += [
        "",
        "| | frozen over trained arithmetic, here | in the released model | building, images/s | over the bare "
        "encoders | peak memory while building, GB | frozen networks, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(_family_cells(family, results)) for family in families]
    return "\n".join(lines)


def _run_cells(family, name, results):
    """The cells of a run, in the order of the table's columns."""
    run = results[family]["runs"][name]
    bare = over_bare(family, name)(results) if run["bare"] else None
    return [
        TITLES[family],
        name,
        run["batch"],
        f"{run['images per second']:.3g}",
        _number(run["over plain"], ".2f"),
        f"{median(run['step']):.3g}",
        _number(run["outside"], ".1%"),
        _number(bare, ".3f"),
        f"{run['peak'] / 1e9:.2f}",
        _number(run["mfu"], ".1%"),
    ]


def _family_cells(family, results):
    """The cells of a family, in the order of the table's columns."""
    found = results[family]
    built = found.get("building", {})
    speed = over_encoders = peak = None
    if "build" in built:
        speed = built["images"] / median(built["build"])
        over_encoders = building(family)(results)
    if built:
        peak = built["peak"] / 1e9
    return [
        TITLES[family],
        f"{found['proportion']:.3f}",
        f"{found['real proportion']:.3f}",
        _number(speed, ".3g"),
        _number(over_encoders, ".3f"),
        _number(peak, ".2f"),
        f"{found['frozen bytes'] / 1e9:.2f}",
    ]


def _number(value, form):
    """A number in this format, or a dash where it is None."""
    return "–" if value is None else format(value, form)


def _row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def verdict(judged):
    """The goals and what was measured, as Markdown."""
    lines = ["| goal | wanted | measured | |", "|---|---|---|---|"]
    for goal, value, met in judged:
        lines.append(
            _row([goal.name, f"{goal.sign} {goal.wanted:g}", _number(value, ".3g"), "met" if met else "missed"])
        )
    return "\n".join(lines)
