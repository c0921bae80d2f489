"""The goals of the throughput benchmark: what each measures, and whether it is met."""

from statistics import median
from typing import NamedTuple

from bench_runs import TITLES


class Goal(NamedTuple):
    """`measure(results)` is to be at least or at most a number. It raises KeyError where it has not been measured."""

    name: str
    family: str | None
    device: str | None
    sign: str
    wanted: float
    measure: object

    def met(self, value):
        return value >= self.wanted if self.sign == ">=" else value <= self.wanted


def faster(family, name, than):
    """How many times as many images a second a run makes as another one: the median over the turns."""

    def measure(results):
        one, other = results[family]["runs"][name], results[family]["runs"][than]
        per_image = [(a / one["batch"], b / other["batch"]) for a, b in zip(one["step"], other["step"])]
        return median(b / a for a, b in per_image)

    return measure


def over_bare(family, name):
    """The steady step over the bare one: the median over the turns."""

    def measure(results):
        run = results[family]["runs"][name]
        return median(step / bare for step, bare in zip(run["step"], run["bare"]))

    return measure


def building(family):
    """The throughput of building the cache over that of the bare encoders."""

    def measure(results):
        found = results[family]["building"]
        return median(bare / build for build, bare in zip(found["build"], found["bare"]))

    return measure


def memory_saved(family, prefix=""):
    """By how many times the frozen networks' size a cached run's peak memory is below a plain one's."""

    def measure(results):
        runs = results[family]["runs"]
        saved = runs[f"{prefix}plain"]["peak"] - runs[f"{prefix}cached"]["peak"]
        return saved / results[family]["frozen bytes"]

    return measure


def peak_memory(family, name):
    return lambda results: results[family]["runs"][name]["peak"] / 1e9


def utilisation(family, name):
    return lambda results: results[family]["runs"][name]["mfu"] or 0.0  # unknown for a card that is not in PEAKS


KINDS = [(family, prefix) for family in ("sd", "sdxl", "decoder", "prior") for prefix in ("", "LoRA ")]
GOALS = [
    Goal("SD cached over plain", "sd", "cpu", ">=", 1.40, faster("sd", "cached", "plain")),
    Goal("SD LoRA cached over plain", "sd", "cpu", ">=", 1.55, faster("sd", "LoRA cached", "LoRA plain")),
    Goal("Kandinsky decoder cached over plain", "decoder", "cpu", ">=", 1.5, faster("decoder", "cached", "plain")),
    Goal("Kandinsky prior cached over plain", "prior", "cpu", ">=", 2.5, faster("prior", "cached", "plain")),
    *(
        Goal(
            f"{TITLES[family]}: {prefix}cached step over the bare one",
            *(family, None, "<=", 1.05),
            over_bare(family, f"{prefix}cached"),
        )
        for family, prefix in KINDS
    ),
    *(
        Goal(f"{TITLES[family]}: building over the bare encoders", family, None, ">=", 0.95, building(family))
        for family in ("sd", "sdxl", "decoder", "prior")
    ),
    *(
        Goal(
            f"{TITLES[family]}: {prefix}memory saved, in frozen networks",
            *(family, None, ">=", 1.0),
            memory_saved(family, prefix),
        )
        for family, prefix in KINDS
    ),
    Goal("ms to read a cached sample of 1024 pixels", None, None, "<=", 2.0, lambda results: results["read ms"]),
    Goal("SD MFU", "sd", "cuda", ">=", 0.40, utilisation("sd", "cached, compiled")),
    Goal("SD LoRA cached over plain", "sd", "cuda", ">=", 2.0, faster("sd", "LoRA cached, graphs", "LoRA plain")),
    Goal("GB for SD", "sd", "cuda", "<=", 12.0, peak_memory("sd", "least memory cached")),
    Goal("GB for SDXL", "sdxl", "cuda", "<=", 24.0, peak_memory("sdxl", "least memory cached")),
]


def judge(goals, results):
    """[(goal, value or None where it was not measured, whether it is met)] of the goals for what was run."""
    judged = []
    for goal in goals:
        if goal.device not in (None, results["device"]) or (goal.family is not None and goal.family not in results):
            continue
        try:
            value = goal.measure(results)
        except KeyError:
            value = None
        judged.append((goal, value, value is not None and goal.met(value)))
    return judged
