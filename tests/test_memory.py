"""What benchmarks/memory.py computes without memory is what a real step takes, byte for byte."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import memory
from memory import CACHED, CHECKPOINTED, FUSED, GIB


@pytest.mark.parametrize(
    "setting",
    [
        ("sd", False, CHECKPOINTED, 2, 64),
        ("prior", False, "--use_ema", 3, 64),
        ("prior", False, f"{CACHED} --optimizer adafactor", 1, 64),
        ("prior", False, f"{CACHED} --full_bf16 --optimizer adamw8bit {FUSED}", 1, 64),
        ("prior", True, CACHED, 1, 64),
    ],
)
def test_fake_tensors_take_what_real_ones_do(setting):
    assert memory.account(*setting, size="tiny") == memory.account(*setting, size="tiny", fake=False)


@pytest.mark.slow
def test_the_ledger_agrees_with_the_allocator():
    """torch's profiler sees every allocation, those inside kernels too."""
    setting = ("sd", False, "--cache_latents", 4, 64, "tiny")
    computed = memory.account(*setting)
    step = memory.make_step(*setting)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert computed["peak"] - computed["resident"] == pytest.approx(peak, rel=0.03)


def test_a_forward_pass_leaves_what_autograd_keeps():
    kept = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = -(-storage.nbytes() // 512) * 512
        return tensor

    with torch.device("cpu"):
        network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3))
    with memory.Ledger() as ledger, torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        pixels = torch.zeros(2, 4, 64, 64)
        before = ledger.now
        output = network(pixels)
        after = ledger.now
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    kept = {key: size for key, size in kept.items() if key not in weights}
    del kept[pixels.untyped_storage()._cdata]
    assert after - before == sum(kept.values()) + -(-output.numel() * 4 // 512) * 512


@pytest.mark.parametrize("family", memory.PUBLISHED)
def test_networks_are_as_large_as_published(family):
    assert memory.count(family) == pytest.approx(memory.PUBLISHED[family], rel=0.03)


def test_a_card_holds_the_peak_and_the_margin():
    assert memory.card(10.5 * GIB) == 12
    assert memory.card(10.6 * GIB) == 16
    assert memory.card(79 * GIB) is None


def test_table_and_check(monkeypatch, capsys, tmp_path):
    def account(family, adapted, switches, batch, resolution):
        peak = 23 if family == "sdxl" and "--full_bf16" in switches else 30 if family == "sdxl" else 8
        return {"resident": 4 * GIB, "peak": peak * GIB, "phase": "backward"}

    monkeypatch.setattr(memory, "account", account)
    monkeypatch.setattr(memory, "count", lambda family: memory.PUBLISHED[family])
    assert memory.main(["--family", "decoder", "--batch", "1", "4", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    settings = len(memory.EVERY_WEIGHT) + len(memory.ADAPTERS)
    assert len(rows) == settings * 2 * 2  # batches, resolutions
    assert "### train_text_to_image_lora_decoder.py, 768 px, batch 4" in capsys.readouterr().out
    assert memory.main(["--check"]) == 1
    assert capsys.readouterr().out.endswith("\nsdxl, every weight, batch 1: 0.50 GiB above 24, the margin included\n")
    monkeypatch.setitem(memory.GOALS, "sdxl", 25)
    assert memory.main(["--check"]) == 0
