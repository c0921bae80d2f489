"""Train the quickstart's digits under several settings, and plot what comes of each.

    python quickstart/compare.py --output_dir quickstart-output/compare --charts docs

Every weight is trained with min-SNR weights off, at gamma 1 and at gamma 5, and with a moving average of the weights;
then adapters of three ranks learn the word "mirrored" on the first of these models. A tenth of the images is for
validation only. Compared are the validation loss, in which nothing is weighted, and the share of a hundred drawings
that a classifier of real digits reads as the word in their prompt. Several seeds tell a difference between settings
from luck. Stopped half-way it continues when it is called again.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

sys.path.append(str(Path(__file__).parent.parent))

from tools.charts.drawing import draw_chart
from tools.charts.series import Line
from training_utils.base import startup
from training_utils.run.metrics import Log

startup.prepare()

import numpy as np  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from make_data import WORDS  # noqa: E402
from score import draw_digits, fit_reader, load_pipeline, read_digits  # noqa: E402

ROOT = Path(__file__).parent.parent
TRAIN = """
    --resolution 32 --train_batch_size 64 --caption_dropout 0.1 --learning_rate 3e-3 --lr_scheduler cosine
    --lr_warmup_steps 50 --validation_split 0.1 --cache_latents --report_to none --resume_from_checkpoint latest
""".split()
WEIGHTS = {
    "min-SNR off": [],
    "min-SNR, γ = 1": ["--snr_gamma", "1"],
    "min-SNR, γ = 5": ["--snr_gamma", "5"],
    "moving average": ["--use_ema"],
}
RANKS = {f"rank {rank}": ["--rank", str(rank), "--train_text_encoder"] for rank in (2, 8, 32)}


def drawing_steps(steps):
    """The steps after which drawings are read: an eighth, a quarter and half of them, and all."""
    return [steps // 8, steps // 4, steps // 2, steps]


def train(script, base, images, out, flags, args, seed):
    """Run a script as a user does, or what is left of it."""
    out.mkdir(parents=True, exist_ok=True)
    every = str(args.max_train_steps // 8)
    command = [sys.executable, script, "--pretrained_model_name_or_path", base, "--train_data_dir", images]
    command += ["--output_dir", out, "--encoding_cache_dir", args.output_dir / "encodings", "--seed", seed, *TRAIN]
    command += ["--max_train_steps", args.max_train_steps, "--checkpointing_steps", every]
    command += ["--validation_steps", every, *flags]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def accuracies(reader, base, out, steps, mirrored):
    """The share of drawings that are read rightly after some steps, {step: share}; stored in a file."""
    path = out / "accuracy.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for step in drawing_steps(steps):
        if str(step) not in known:
            folder = out / f"checkpoint-{step}"
            if (folder / "unet").is_dir():
                part = "unet_ema" if (folder / "unet_ema").is_dir() else "unet"
                network = UNet2DConditionModel.from_pretrained(folder, subfolder=part)
                pipeline = load_pipeline(base, unet=network)
            else:
                pipeline = load_pipeline(base, folder)
            read = read_digits(reader, draw_digits(pipeline, mirrored, 25, 3.0, seed=0), mirrored)
            known[str(step)] = float((read == np.arange(len(WORDS))[:, None]).mean())
            path.write_text(json.dumps(known))
            del pipeline
            gc.collect()
    return {int(step): share for step, share in known.items()}


def averaged(curves):
    """The mean of several {step: value} at the steps that all have."""
    shared = sorted(set.intersection(*map(set, curves)))
    return {step: mean(curve[step] for curve in curves) for step in shared}


def spread(values, digits):
    """Several numbers as their mean, and their range where there are several."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{mean(values):.{digits}f}" + (f" ({low} to {high})" if low != high else "")


def table(results, steps):
    """Lines of Markdown: a row for each setting of {name: [(validation losses, accuracies), one for each seed]}."""
    titles = " | ".join(f"read rightly after {step}" for step in drawing_steps(steps))
    yield f"| setting | validation loss after {steps} steps | {titles} |"
    yield "|---" * (2 + len(drawing_steps(steps))) + "|"
    for name, runs in results.items():
        last = [losses[steps] for losses, _ in runs]
        shares = (spread([read[step] for _, read in runs], 2) for step in drawing_steps(steps))
        yield f"| {name} | {spread(last, 4)} | {' | '.join(shares)} |"


def charts(results, folder, name, title):
    """Write two charts of a table's results as SVG files."""
    for kind, at, what in (("loss", 0, "validation loss"), ("accuracy", 1, "digits read rightly")):
        lines = [
            Line(setting, list(averaged([run[at] for run in runs]).items()), colour, "dotted")
            for colour, (setting, runs) in enumerate(results.items())
        ]
        text = draw_chart(lines, f"{what}, {title}", width=640, height=320, standalone=True)
        (folder / f"settings-{name}-{kind}.svg").write_text(text, encoding="utf-8")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the quickstart's digits under several settings.")
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart-output/compare"), help="for the runs")
    parser.add_argument("--base", type=Path, default=Path("quickstart-output/base"), help="of make_base.py")
    parser.add_argument("--digits", type=Path, default=Path("quickstart-output/digits"), help="of make_data.py")
    parser.add_argument("--mirrored", type=Path, default=Path("quickstart-output/mirrored"), help="with --mirrored")
    parser.add_argument("--charts", type=Path, help="folder to write the charts to, left out --output_dir")
    parser.add_argument("--max_train_steps", type=int, default=800, help="steps of a run, a multiple of 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the runs of each setting")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.output_dir = args.output_dir.resolve()
    reader, folder = fit_reader()[0], args.charts or args.output_dir
    groups = [
        ("weights", "every weight", "train_text_to_image.py", args.base, args.digits, WEIGHTS),
        ("ranks", "adapters", "train_text_to_image_lora.py", None, args.mirrored, RANKS),
    ]
    for name, title, script, base, images, settings in groups:
        results = {}
        for setting, flags in settings.items():
            for seed in args.seeds:
                out = args.output_dir / "-".join([name, *flags, str(seed)]).replace("--", "")
                start = (base or args.output_dir / f"weights-{args.seeds[0]}").resolve()
                train(script, start, images.resolve(), out, flags, args, seed)
                read = accuracies(reader, start, out, args.max_train_steps, mirrored=base is None)
                results.setdefault(setting, []).append((Log(out).finite("val_loss"), read))
        folder.mkdir(parents=True, exist_ok=True)
        charts(results, folder, name, title)
        text = "\n".join(table(results, args.max_train_steps))
        (args.output_dir / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{title}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
