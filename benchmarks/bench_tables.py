"""What the throughput benchmark reports, as dicts and as Markdown."""

from statistics import median

from bench_goals import building, over_bare
from bench_runs import FAMILIES, TITLES


def summary(run, plain, flop, frozen_flop, peak_flops):
    """What is reported of a Run, as JSON holds it; `plain` is the run it is compared with, or None."""
    work = flop + (0 if run.cached else frozen_flop)
    speed = run.batch / median(run.step)
    return {
        "script": f"{run.script}.py",
        "batch": run.batch,
        "images per second": speed,
        "over plain": None if plain is None or plain.failed else median(b / a for a, b in zip(run.step, plain.step)),
        "step": run.step,
        "bare": run.bare,
        "outside": median(1 - bare / step for step, bare in zip(run.step, run.bare)) if run.bare else None,
        "peak": run.peak,
        "mfu": speed * work / peak_flops if peak_flops else None,
    }


def table(results):
    """The results as Markdown."""
    lines = [
        "| | run | batch | images/s | over plain | seconds a step | outside the network | over the bare step "
        "| peak memory, GB | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in (family for family in FAMILIES if family in results):
        for name, run in results[family]["runs"].items():
            bare = over_bare(family, name)(results) if run["bare"] else None
            cells = [
                *(TITLES[family], name, run["batch"], f"{run['images per second']:.3g}"),
                *("–" if run["over plain"] is None else f"{run['over plain']:.2f}", f"{median(run['step']):.3g}"),
                *("–" if run["outside"] is None else f"{run['outside']:.1%}", "–" if bare is None else f"{bare:.3f}"),
                *(f"{run['peak'] / 1e9:.2f}", "–" if run["mfu"] is None else f"{run['mfu']:.1%}"),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| | frozen over trained arithmetic, here | in the released model | building, images/s | over the bare "
        "encoders | peak memory while building, GB | frozen networks, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in (family for family in FAMILIES if family in results):
        found = results[family]
        cells = [TITLES[family], f"{found['proportion']:.3f}", f"{found['real proportion']:.3f}"]
        built = found.get("building", {})
        if "build" in built:
            speed = built["images"] / median(built["build"])
            cells += [f"{speed:.3g}", f"{building(family)(results):.3f}"]
        else:
            cells += ["–", "–"]
        cells.append(f"{built['peak'] / 1e9:.2f}" if built else "–")
        lines.append("| " + " | ".join([*cells, f"{found['frozen bytes'] / 1e9:.2f}"]) + " |")
    return "\n".join(lines)


def verdict(judged):
    """The goals and what was measured, as Markdown."""
    lines = ["| goal | wanted | measured | |", "|---|---|---|---|"]
    for goal, value, met in judged:
        measured = "–" if value is None else f"{value:.3g}"
        lines.append(f"| {goal.name} | {goal.sign} {goal.wanted:g} | {measured} | {'met' if met else 'missed'} |")
    return "\n".join(lines)
