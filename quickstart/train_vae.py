"""Train the tiny VAE of the quickstart. Its weights are part of the repository, so nobody has to run this.

    python quickstart/train_vae.py --output_dir quickstart/vae

Four levels, as in Stable Diffusion: a 32x32 image becomes a 4x4 latent of 4 channels. That is 64 numbers, as many as
scikit-learn keeps of each digit.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from make_data import draw_scan
from sklearn.datasets import load_digits
from torch.nn import functional as F


def load_scans() -> torch.Tensor:
    """Every scan as (1797, 3, 32, 32) in -1..1."""
    scans = np.stack([np.asarray(draw_scan(ink)) for ink in load_digits().images])
    return torch.from_numpy(scans).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_vae() -> AutoencoderKL:
    levels = (8, 16, 32, 48)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


@torch.no_grad()
def measure(vae: AutoencoderKL, scans: torch.Tensor) -> tuple[float, float]:
    """The mean squared error of all scans there and back, and the standard deviation of their latents."""
    latents = vae.encode(scans).latent_dist.sample(torch.Generator().manual_seed(0))
    return F.mse_loss(vae.decode(latents).sample, scans).item(), latents.std().item()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the tiny VAE of the quickstart.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "vae", help="folder to write to")
    parser.add_argument(
        "--max_train_steps", type=int, default=2500, help="optimizer steps; 2500 take 12 minutes on one core"
    )
    parser.add_argument("--train_batch_size", type=int, default=64, help="scans in a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak, reached after a tenth of the steps")
    parser.add_argument(
        "--kl_weight",
        type=float,
        default=3e-6,
        help="pull of the latents towards a unit normal; more blurs the digits",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and latent noise")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    scans = load_scans()
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4)
    # A tenth of ten steps would make OneCycleLR divide by zero.
    total_steps = max(args.max_train_steps, 20)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps, pct_start=0.1)

    start = time.perf_counter()
    for step in range(1, args.max_train_steps + 1):
        batch = scans[torch.randint(len(scans), (args.train_batch_size,))]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        loss = error + args.kl_weight * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: squared error {error.item():.5f}, {time.perf_counter() - start:.0f} s", flush=True)

    # Stored in half precision to keep the repository small, and measured as stored.
    vae = vae.half().float().eval()
    error, deviation = measure(vae, scans)
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))
    vae.half().save_pretrained(args.output_dir)
    print(f"squared error of all scans, there and back: {error:.5f} of pixels in -1..1")
    print(f"scaling_factor: {vae.config.scaling_factor}, so that the latents have a standard deviation of 1")


if __name__ == "__main__":
    main()
