#!/usr/bin/env python
"""What the trained network alone can do, on tensors that are ready: Stable Diffusion's UNet, random weights.

    python benchmarks/network.py                    on the GPU, bfloat16 autocast, released size
    python benchmarks/network.py --size mid         without a GPU, float32

It compares what the scripts do with what they might do: channels_last, PEFT's own forward of an adapter, and on a GPU
CUDA graphs, as `--dynamo_backend cudagraphs` has them, and the network's blocks compiled by inductor each by itself,
which takes two minutes. "host" is the time until Python has issued a step: where it is the whole of it, the GPU
waits for Python.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import models  # noqa: E402
import torch  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402

from training_utils.torch_backend import lora  # noqa: E402
from training_utils.torch_backend.lora import FewerPasses  # noqa: E402


def unet_of(size, device):
    with torch.device(device):
        return models.networks("sd", size)["trained"]().train()


def inputs(size, batch, device):
    """(latents, timesteps, text states) as the UNet takes them."""
    shape, side = models.SD[size], models.SD[size]["resolution"] // 8
    text = torch.randn(batch, models.TOKENS, shape["text"][0], device=device)
    return torch.randn(batch, 4, side, side, device=device), torch.randint(0, 1000, (batch,), device=device), text


def measure(name, network, parameters, tensors, steps):
    """Print the time of a step, its peak memory and images a second."""
    device, batch = tensors[0].device, len(tensors[0])
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction = network(*tensors)[0]
        prediction.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    issued = time.perf_counter()
    _wait(device)
    seconds = (time.perf_counter() - began) / steps
    host = (issued - began) / steps
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
    print(f"{name}, batch {batch}: {1000 * seconds:.1f} ms (host {1000 * host:.1f}), {batch / seconds:.2f}/s{peak}")


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def use_own_forward(unet, own):
    """Give adapters the forward of lora.py, or PEFT's."""
    for layer in (module for module in unet.modules() if isinstance(module, LoraLayer)):
        layer.lora_variant = {"default": FewerPasses} if own else {}
        layer.cast_input_dtype_enabled = not own


def replayed(network):
    """The network as CUDA graphs, which are recorded at its first calls."""
    return torch.compile(network, backend="cudagraphs", dynamic=False)


def compile_blocks(unet):
    """Have inductor compile each residual and transformer block by itself."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.compile(backend="inductor", dynamic=False)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=("tiny", "mid", "real"), default="real" if on_gpu else "mid")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32] if on_gpu else [8])
    parser.add_argument("--steps", type=int, default=8)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = unet_of(args.size, device)
    for layout in (torch.contiguous_format, torch.channels_last):
        unet.to(memory_format=layout)
        for batch in args.batches:
            latents, *rest = inputs(args.size, batch, device)
            tensors = (latents.to(memory_format=layout), *rest)
            measure(f"every weight, {layout}", unet, list(unet.parameters()), tensors, args.steps)
    if device.type == "cuda":
        unet.to(memory_format=torch.contiguous_format)
        parameters = list(unet.parameters())
        few, many = (inputs(args.size, batch, device) for batch in (args.batches[0], args.batches[-1]))
        measure("every weight, CUDA graphs", replayed(unet), parameters, few, args.steps)
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64  # the blocks have as many shapes
        compile_blocks(unet)
        measure("every weight, blocks compiled", unet, parameters, many, args.steps)

    adapted = unet_of(args.size, device)
    if device.type == "cuda":
        adapted.bfloat16()
    lora.add_adapter(adapted, lora.UNET_LAYERS, rank=4)
    parameters = lora.trainable_parameters([adapted])
    for name, own in 2 * [("ours", True), ("PEFT's", False)]:  # in turn, twice
        use_own_forward(adapted, own)
        for batch in (1, 16) if device.type == "cuda" else args.batches:
            measure(f"adapters, {name} forward", adapted, parameters, inputs(args.size, batch, device), args.steps)
    if device.type == "cuda":
        use_own_forward(adapted, True)
        tensors = inputs(args.size, 1, device)
        measure("adapters, CUDA graphs", replayed(adapted), parameters, tensors, args.steps)


if __name__ == "__main__":
    main()
