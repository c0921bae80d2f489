"""The loss is the formula's, held against float64 references written from the papers."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

import train_text_to_image
from training_utils.base import losses
from training_utils.cli.options import ObjectiveOptions

GAMMA = 5.0


def alphas(zero_terminal_snr=False):
    """Cumulative products of SD's scaled-linear schedule in float64, optionally rescaled (2305.08891, algorithm 1)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    products = np.cumprod(1 - betas)
    if zero_terminal_snr:
        roots = np.sqrt(products)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        products = roots**2
    return products


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_min_snr_weight(kind, zero_terminal_snr):
    """min(SNR, gamma) for x0; divided by SNR for epsilon and by SNR + 1 for v; finite at SNR = 0."""
    products = alphas(zero_terminal_snr)
    snr = products / (1 - products)
    with np.errstate(divide="ignore", invalid="ignore"):
        clipped = np.minimum(snr, GAMMA)
        expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[kind]
    if zero_terminal_snr and kind == "epsilon":
        expected[-1] = 1  # the limit of 0 / 0
    got = losses.min_snr_weight(losses.signal_to_noise(torch.tensor(products).float()), GAMMA, kind)
    assert torch.isfinite(got).all()
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_min_snr_refuses_other_targets():
    with pytest.raises(ValueError, match="not defined"):
        losses.min_snr_weight(torch.ones(2), GAMMA, "flow")


@pytest.fixture(scope="module")
def parts(sd):
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
    text = CLIPTextModel.from_pretrained(sd, subfolder="text_encoder").eval()
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    return unet, vae, text


def a_batch(seed=0, size=4):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    return {
        "pixels": normal(size, 3, 16, 16).clip(-1, 1),
        "tokens": torch.from_numpy(rng.integers(0, 100, (size, 16))),
        "timestep": torch.tensor([0, 250, 700, 999]),
        "latent_noise": normal(size, 4, 8, 8),
        "noise": normal(size, 4, 8, 8),
    }


def encoded(parts, batch):
    """A batch with what the frozen networks make of it, and the scaling factor, as the loop passes them."""
    _, vae, text = parts
    made = train_text_to_image.encode_images(vae, batch) | train_text_to_image.encode_captions(text, batch)
    return batch | made, vae.config.scaling_factor


def reference(parts, batch, kind, snr_gamma=None, dream_p=None, zero_terminal_snr=False):
    """The same loss in float64, from the papers: Ho et al. 2020 eq. 4; Salimans & Ho 2022 (v); DREAM algorithm 1."""
    unet, vae, text = (copy.deepcopy(part).double() for part in parts)
    a = torch.from_numpy(alphas(zero_terminal_snr))[batch["timestep"]].view(-1, 1, 1, 1)
    noise, input_noise = batch["noise"].double(), batch.get("input_noise", batch["noise"]).double()
    with torch.no_grad():
        moments = vae.encode(batch["pixels"].double()).latent_dist
        x0 = vae.config.scaling_factor * (moments.mean + moments.std * batch["latent_noise"].double())
        states = text(batch["tokens"]).last_hidden_state
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * input_noise
        target = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0
        if dream_p is not None:
            shift = (1 - a).sqrt() ** dream_p * (noise - unet(noisy, batch["timestep"], states).sample)
            noisy, target = noisy + (1 - a).sqrt() * shift, target + shift
        error = unet(noisy, batch["timestep"], states).sample - target
    loss = error.square().mean(dim=(1, 2, 3))
    if snr_gamma:
        snr = (a / (1 - a)).flatten()
        weight = snr.clip(max=snr_gamma)
        loss = loss * (weight / snr if kind == "epsilon" else weight / (snr + 1))
    return loss


CASES = [
    ("epsilon", {}),
    ("v_prediction", {}),
    ("epsilon", {"snr_gamma": GAMMA}),
    ("v_prediction", {"snr_gamma": GAMMA}),
    ("v_prediction", {"snr_gamma": GAMMA, "zero_terminal_snr": True}),
    ("epsilon", {"dream_p": 1.0}),
    ("epsilon", {"dream_p": 3.0, "snr_gamma": GAMMA}),
]


def schedule_for(sd, kind, zero_terminal_snr=False):
    return DDPMScheduler.from_pretrained(
        sd, subfolder="scheduler", prediction_type=kind, rescale_betas_zero_snr=zero_terminal_snr
    )


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_training_loss(sd, parts, kind, options):
    options = dict(options)
    schedule = schedule_for(sd, kind, options.get("zero_terminal_snr", False))
    batch = a_batch()
    expected = reference(parts, batch, kind, **options)
    options.pop("zero_terminal_snr", None)
    got = train_text_to_image.training_loss(parts[0], schedule, *encoded(parts, batch), ObjectiveOptions(**options))
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-7)


def test_input_perturbation_changes_the_input_and_not_the_target(sd, parts):
    batch = a_batch()
    batch["input_noise"] = batch["noise"] + 0.1 * a_batch(1)["noise"]
    got = train_text_to_image.training_loss(parts[0], schedule_for(sd, "epsilon"), *encoded(parts, batch))
    torch.testing.assert_close(got.double(), reference(parts, batch, "epsilon"), rtol=2e-5, atol=1e-7)


def test_noise_is_mixed_in_float32_under_bf16(sd, parts):
    """The originals mix in the compute type: in bf16 the noise at timesteps 0 and 1 is then exactly 0."""
    unet, vae, text = parts
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, noisy, timesteps, states):
            seen["noisy"] = noisy
            return unet(noisy, timesteps, states.float())

    batch = a_batch()
    batch["timestep"] = torch.tensor([0, 1, 2, 3])
    half = [copy.deepcopy(part).to(torch.bfloat16) for part in (vae, text)]
    train_text_to_image.training_loss(Spy(), schedule_for(sd, "epsilon"), *encoded((unet, *half), batch))
    assert seen["noisy"].dtype == torch.float32
    with torch.no_grad():
        moments = half[0].encode(batch["pixels"].bfloat16()).latent_dist
    clean = (moments.mean.float() + moments.std.float() * batch["latent_noise"]) * vae.config.scaling_factor
    a = torch.from_numpy(alphas())[:4].view(-1, 1, 1, 1)
    level = (seen["noisy"].double() - a.sqrt() * clean.double()) / batch["noise"].double()
    torch.testing.assert_close(level, (1 - a).sqrt().expand_as(level), rtol=1e-2, atol=1e-4)


def test_frozen_networks_get_no_gradient(sd, parts):
    unet, vae, text = (copy.deepcopy(part) for part in parts)
    batch, scaling_factor = encoded((unet, vae, text), a_batch())
    train_text_to_image.training_loss(unet, schedule_for(sd, "epsilon"), batch, scaling_factor).sum().backward()
    assert all(p.grad is None for part in (vae, text) for p in part.parameters())
    assert all(p.grad is not None for p in unet.parameters())
