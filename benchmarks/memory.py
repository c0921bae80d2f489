#!/usr/bin/env python
"""Peak device memory of a step of each script, for models of the released sizes: computed, without a GPU.

    python benchmarks/memory.py --family sd sdxl --batch 1 4
    python benchmarks/memory.py --check                     exit code 1, and what is missed, unless the goals are met

The step is the scripts' own (their losses, adapters, optimizers) on fake tensors, which have shapes and types but no
contents: nothing is computed and nothing allocated. Every storage that comes and goes on the way, in the frozen
networks, the forward pass, the backward pass and the step, is entered in a ledger, whose largest sum is the peak. It
is what torch.cuda.max_memory_allocated counts, except scratch space inside single kernels (cuDNN's, cuBLAS's), and
supposes attention that never stores its matrix, as torch's on CUDA. Validation images are not counted. `--measure`
makes the same step for real too, on a CUDA GPU.
"""

import argparse
import importlib
import json
import math
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import models  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import convert_to_fp32  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402
from ledger import Ledger, cuda_autocast, faking  # noqa: E402

from training_utils.torch_backend import kandinsky, lora, optimizers, processes  # noqa: E402
from training_utils.torch_backend.ema import EMAWeights  # noqa: E402
from training_utils.torch_backend.gradient import FusedBackward  # noqa: E402
from training_utils.torch_backend.models import checkpoint_blocks  # noqa: E402

GIB = 2**30
MARGIN = 1.5 * GIB  # a convention: the CUDA context with its kernels, their scratch space, the allocator's gaps
CARDS = (8, 12, 16, 24, 40, 80)  # GiB
GOALS = {"sd": 12, "sdxl": 24}  # GiB with the margin, for every weight at batch 1

HALF = "--mixed_precision bf16"
CHECKPOINTED = f"{HALF} --gradient_checkpointing"
CACHED = f"{CHECKPOINTED} --cache_latents --cache_text_embeddings"
FUSED = "--fused_backward_pass --max_grad_norm 0"
EVERY_WEIGHT = [
    "",
    HALF,
    CHECKPOINTED,
    CACHED,
    f"{CACHED} --use_ema",
    f"{CACHED} --use_ema --offload_ema",
    f"{CACHED} --optimizer adamw8bit",
    f"{CACHED} --optimizer adafactor",
    f"{CACHED} --optimizer adamw8bit {FUSED}",
    f"{CACHED} --optimizer adafactor {FUSED}",
    f"{CACHED} --full_bf16",
    f"{CACHED} --full_bf16 --optimizer adamw8bit {FUSED}",
    f"{CACHED} --full_bf16 --optimizer adafactor {FUSED}",
]
ADAPTERS = ["", HALF, CHECKPOINTED, CACHED]

SCRIPTS = {"sd": "", "sdxl": "sdxl", "prior": "prior", "decoder": "decoder"}
RESOLUTIONS = {"sd": [512], "sdxl": [1024], "prior": [512], "decoder": [512, 768]}  # the prior sees 224 px at any
SEEING = {"sd": ["vae"], "sdxl": ["vae"], "prior": ["image_encoder"], "decoder": ["movq", "image_encoder"]}
READING = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "prior": ["text_encoder"],
    "decoder": [],
}
# Millions of parameters, as the models' publishers give them; Kandinsky's rounded.
PUBLISHED = {
    "sd": {"trained": 860, "vae": 84, "text_encoder": 123},
    "sdxl": {"trained": 2567, "vae": 84, "text_encoder": 123, "text_encoder_2": 695},
    "prior": {"trained": 1000, "image_encoder": 1845, "text_encoder": 695},
    "decoder": {"trained": 1220, "image_encoder": 1845, "movq": 67},
}


# ---------------------------------------------------------------------------------------------------------------------
# Accounts
# ---------------------------------------------------------------------------------------------------------------------


def account(family, adapted, switches, batch_size, resolution, size="real", fake=True):
    """The memory of a step, in bytes: {"resident", between steps, "peak"}, and the "phase" of the peak.

    See `make_step`. What is not `fake` is computed on the CPU.
    """
    ledger = Ledger()
    with ExitStack() as stack:
        for context in (cuda_autocast(), *(faking() if fake else ()), ledger):
            stack.enter_context(context)
        step = make_step(family, adapted, switches, batch_size, resolution, size, "cpu")
        resident = ledger.now
        ledger.restart()
        step(lambda phase: setattr(ledger, "phase", phase))
    return {"resident": resident, "peak": ledger.peak, "phase": ledger.peak_phase}


def measure(*setting):
    """What torch.cuda.max_memory_allocated says after a real step; None where it does not fit."""
    try:
        step = make_step(*setting, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        step = None
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------


def make_step(family, adapted, switches, batch_size, resolution, size="real", device="cpu"):
    """A function that makes a step as the script does; what stays in memory between steps is there already.

    `adapted`: by the LoRA script; `switches`: flags that the script must take; `size`: of the
    networks, as in models.py. The function tells its argument, a function, what it does next.
    """
    script, args = _script(family, adapted, switches)
    trained, frozen = _load(family, adapted, args, size, device)
    schedule = DDPMScheduler()
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(device)
    settings = {"sd": [0.18215], "sdxl": [0.13025]}.get(family, [])  # scaling factors
    if family == "prior":
        settings = [kandinsky.embedding_statistics(trained)]
    cached, others = _encoders(family, script, args, frozen)
    start = _batch(family, batch_size, resolution, trained, frozen, device)
    for encode in cached:
        start |= encode(start)
    cached = frozen = encode = None  # what nothing else refers to is gone
    if args.cache_latents:
        start = {name: value for name, value in start.items() if not name.endswith("pixels")}

    parameters = lora.trainable_parameters([trained])
    full_bf16, offloaded = getattr(args, "full_bf16", False), getattr(args, "offload_ema", False)
    optimizer = optimizers.make_optimizer(
        parameters,
        args.optimization,
        learning_rate=args.learning_rate,
        rounding_seed=(lambda index: index) if full_bf16 else None,
    )
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # as it is on CUDA
    for parameter in parameters:  # one at a time, so that the state is there without all gradients ever being so
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    ema = None
    if args.use_ema and (device != "cpu" or not offloaded):  # offloaded, it would be elsewhere
        ema = EMAWeights([trained], args.ema_decay, offloaded)
    fused = None
    if getattr(args, "fused_backward_pass", False):
        guard = SimpleNamespace(check=lambda norm, part=False: None)
        fused = FusedBackward(SimpleNamespace(optimizer=optimizer), guard)

    def network(*inputs, **options):  # as accelerate wraps it
        with torch.autocast(device, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            output = trained(*inputs, **options)
        return convert_to_fp32(output)

    def step(begin=lambda phase: None):
        begin("frozen networks")
        batch = dict(start)
        for encode in others:
            batch |= encode(batch)
        begin("forward")
        loss = (script.training_loss(network, schedule, batch, *settings) * batch["weight"]).sum()
        begin("backward")
        if fused:
            fused.begin(loss)
        loss.backward()
        begin("step")
        if not fused:
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(torch.zeros((), device=device))

    return step


def _script_name(family, adapted):
    return "_".join(filter(None, ["train_text_to_image", "lora" if adapted else "", SCRIPTS[family]]))


def _script(family, adapted, switches):
    """The module of a script, and its arguments with these switches, which it must take."""
    script = importlib.import_module(_script_name(family, adapted))
    base = ["--pretrained_model_name_or_path", family] if family in ("sd", "sdxl") else []
    if not READING[family]:
        switches = switches.replace("--cache_text_embeddings", "")
    return script, script.parse_args([*base, "--train_data_dir", str(ROOT), *switches.split()])


def _cast(network, dtype):
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def _load(family, adapted, args, size, device):
    """The trained network, and the frozen ones by name, as the script's `load_models` leaves them."""
    half = processes.PRECISIONS.get(args.mixed_precision, torch.float32)
    frozen = {}
    with torch.device(device):
        makers = models.networks(family, size)
        trained = makers.pop("trained")().train()
        for name, make in makers.items():
            frozen[name] = make().requires_grad_(False).eval()
            if (family, name) != ("sdxl", "vae"):  # which overflows in half precision
                _cast(frozen[name], half)
    if family == "prior":
        torch.nn.init.ones_(trained.clip_std)
    if adapted:
        _cast(trained, half)
        layers = lora.UNET_LAYERS + (lora.ADDED_KV_LAYERS if family == "decoder" else [])
        lora.add_adapter(trained, layers, args.rank)
    elif args.full_bf16:
        optimizers.to_bfloat16(trained)
    if args.gradient_checkpointing and family == "prior":
        checkpoint_blocks(trained.transformer_blocks)
    elif args.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    return trained, frozen


def _encoders(family, script, args, frozen):
    """What the frozen networks make of a batch, as functions of it: (those whose output is cached, the others)."""

    def encoder(name, parts):
        encode = getattr(script, name).__wrapped__  # past frozen.encoder, which on a CPU takes one sample at a time
        networks = [frozen[part] for part in parts]
        return torch.no_grad()(partial(encode, networks if len(networks) > 1 else networks[0]))

    made = {True: [], False: []}
    made[args.cache_latents].append(encoder("encode_images", SEEING[family]))
    if READING[family]:
        made[args.cache_text_embeddings].append(encoder("encode_captions", READING[family]))
    return made[True], made[False]


def _batch(family, count, resolution, trained, frozen, device):
    """What the data workers make of images and captions: zeros, of the shapes of `count` samples."""

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(count, *shape, dtype=dtype, device=device)

    batch = {"timestep": zeros(dtype=torch.long), "weight": zeros()}
    for name, key in zip(READING[family], ("tokens", "tokens_2")):
        batch[key] = zeros(frozen[name].config.max_position_embeddings, dtype=torch.long)
    if family in ("prior", "decoder"):
        batch["clip_pixels"] = zeros(3, 224, 224)
    if family == "prior":
        return batch | {"noise": zeros(trained.config.embedding_dim), "token_mask": zeros(models.TOKENS).bool()}
    if family == "sdxl":
        batch |= {"time_ids": zeros(6), "caption_given": zeros()}
    noise = {name: zeros(4, resolution // 8, resolution // 8) for name in ("noise", "latent_noise")}
    return batch | noise | {"pixels": zeros(3, resolution, resolution)}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def count(family):
    """Millions of parameters, {network: number}."""
    with torch.device("meta"):
        made = {name: make() for name, make in models.networks(family, "real").items()}
    return {name: sum(weight.numel() for weight in network.parameters()) / 1e6 for name, network in made.items()}


def card(peak):
    """The smallest of the usual cards, in GiB, that holds a peak in bytes and the margin; None where none does."""
    return next((size for size in CARDS if peak + MARGIN <= size * GIB), None)


def missed(rows):
    """What is missed of the goals, a list of sentences."""
    sentences = []
    for family, goal in GOALS.items():
        peaks = [row["peak"] for row in rows if (row["family"], row["lora"], row["batch"]) == (family, False, 1)]
        beyond = (min(peaks) + MARGIN) / GIB - goal
        if beyond > 0:
            sentences.append(f"{family}, every weight, batch 1: {beyond:.2f} GiB above {goal}, the margin included")
    return sentences


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="numbers of images in a batch")
    parser.add_argument("--json", help="file for the figures, in bytes")
    parser.add_argument("--check", action="store_true", help="are the goals met? sd and sdxl, every weight, batch 1")
    parser.add_argument("--measure", action="store_true", help="make each step for real too, on a CUDA GPU")
    args = parser.parse_args(argv)
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure needs a CUDA GPU")
    print(f"Peak memory in GiB, computed; a card must hold {MARGIN / GIB:g} GiB more, a convention.")
    rows, last = [], " measured |" if args.measure else ""
    for family in GOALS if args.check else args.family:
        sizes = [f"{name} {number:.0f} ({PUBLISHED[family][name]})" for name, number in count(family).items()]
        print(f"\n{family}, millions of parameters (and as published): {', '.join(sizes)}")
        tables = [
            (adapted, resolution, batch)
            for adapted in ([False] if args.check else [False, True])
            for resolution in RESOLUTIONS[family]
            for batch in ([1] if args.check else args.batch)
        ]
        for adapted, resolution, batch in tables:
            print(f"\n### {_script_name(family, adapted)}.py, {resolution} px, batch {batch}\n")
            print(f"| switches | between steps | peak | when | card |{last}")
            print(f"|:--|--:|--:|:--|--:|{'--:|' if last else ''}")
            for switches in ADAPTERS if adapted else EVERY_WEIGHT:
                setting = (family, adapted, switches, batch, resolution)
                row = dict(zip(("family", "lora", "switches", "batch", "resolution"), setting)) | account(*setting)
                row["card"] = card(row["peak"])
                cells = [f"`{switches}`" if switches else "", f"{row['resident'] / GIB:.2f}"]
                cells += [f"{row['peak'] / GIB:.2f}", row["phase"], str(row["card"])]
                if args.measure:
                    row["measured"] = measure(*setting)
                    cells.append(f"{row['measured'] / GIB:.2f}" if row["measured"] else "does not fit")
                print(f"| {' | '.join(cells)} |", flush=True)
                rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    sentences = missed(rows) if args.check else []
    if args.check:
        print("\n" + ("\n".join(sentences) or "the goals are met"))
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
