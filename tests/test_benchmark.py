"""The benchmark's goals can be missed, and its models do their arithmetic in the released ones' proportion."""

import json
import sys
from statistics import median

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import throughput
from bench_goals import Goal, faster, judge
from throughput import conclude


def results(**speeds):
    """Results of a family "sd" whose runs take so many seconds a step, in each of their turns."""
    return {
        "device": "cpu",
        "sd": {"runs": {name: {"batch": 4, "step": step} for name, step in speeds.items()}},
    }


def test_a_ratio_is_the_median_of_the_ratios_within_the_turns():
    found = results(plain=[3.0, 30.0, 3.3], cached=[2.0, 10.0, 2.0])  # the machine was busy in the second turn
    assert faster("sd", "cached", "plain")(found) == pytest.approx(1.65)


def test_goals_are_judged_by_what_was_measured():
    found = results(plain=[3.0], cached=[2.0])
    goals = [
        Goal("met", "sd", None, ">=", 1.5, faster("sd", "cached", "plain")),
        Goal("missed", "sd", "cpu", ">=", 1.51, faster("sd", "cached", "plain")),
        Goal("too much", "sd", None, "<=", 1.49, faster("sd", "cached", "plain")),
        Goal("not measured", "sd", None, ">=", 0.0, faster("sd", "LoRA cached", "plain")),
        Goal("of a GPU", "sd", "cuda", ">=", 99.0, faster("sd", "cached", "plain")),
        Goal("of what was not run", "prior", None, ">=", 99.0, faster("prior", "cached", "plain")),
    ]
    judged = judge(goals, found)
    assert [goal.name for goal, _, met in judged if met] == ["met"]
    assert [goal.name for goal, _, met in judged if not met] == ["missed", "too much", "not measured"]


def test_a_run_that_does_not_exist_is_said(capsys):
    assert throughput.parse_args(["--device", "cpu", "--only", "LoRA cached"]).only == ["LoRA cached"]
    with pytest.raises(SystemExit):
        throughput.parse_args(["--device", "cpu", "--only", "LoRA cashed"])
    assert "'LoRA cashed'; there are LoRA cached" in capsys.readouterr().err


@pytest.mark.slow
def test_the_scripts_are_measured_and_a_missed_goal_is_said(tmp_path, capsys):
    path = tmp_path / "found.json"
    words = "--family sd --device cpu --size tiny --repeats 1 --steps 1 --json".split()
    found = throughput.measure(throughput.parse_args([*words, str(path)]))
    runs = found["sd"]["runs"]
    assert set(runs) == {"plain", "cached", "LoRA plain", "LoRA cached"}
    assert all(median(run["bare"]) > 0 and run["peak"] > 1e8 for run in runs.values())
    assert found["sd"]["building"]["bare"][0] > 0

    speed = faster("sd", "cached", "plain")
    easy, hard = (Goal(name, "sd", None, ">=", wanted, speed) for name, wanted in (("easy", 0.0), ("hard", 1e9)))
    assert conclude(found, [easy], True, path) == 0
    assert "missed" not in capsys.readouterr().err
    assert conclude(found, [easy, hard], True, path) == 1
    assert "missed: hard\n" in capsys.readouterr().err
    assert conclude(found, [easy, hard], False, path) == 0
    assert [fact["met"] for fact in json.loads(path.read_text())["goals"]] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl", "decoder", "prior"])
def test_mid_size_models_have_the_released_models_proportions(family):
    import models

    mid, real = models.count(family, "mid"), models.count(family, "real")
    for training in ("training", "lora"):
        assert mid["frozen"] / mid[training] == pytest.approx(real["frozen"] / real[training], rel=0.03)


@pytest.mark.slow
def test_the_arithmetic_is_that_of_the_released_models():
    """In TFLOP an image of 512 pixels: the UNet's training, and the VAE's and the text encoder's encoding."""
    import models

    found = models.count("sd", "real")
    assert found["trained parameters"] == 859_520_964  # as the model's card has it
    assert found["training"] / 1e12 == pytest.approx(2.407, abs=0.001)
    assert found["frozen"] / 1e12 == pytest.approx(1.117 + 0.013, abs=0.001)
