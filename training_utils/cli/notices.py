"""What is not wrong with a command line but surely not meant, as sentences."""

import os

from training_utils.cli import table
from training_utils.cli.arguments import Arguments
from training_utils.cli.optimizers import OPTIMIZERS


def notices(args: Arguments) -> list[str]:
    """What a user should be told about the flags of a run."""
    found = [
        *_without_effect(args),
        *_timestep_bias(args),
        *_warmup(args),
        *_output_folder(args),
        *_learning_rate(args),
    ]
    return found


def _without_effect(args: Arguments) -> list[str]:
    found = []
    for name, flag in table.flags_of(args.script.name).items():
        need = flag.needs
        if need is None or need.refused or name not in args.given:
            continue
        if not need.are_met(vars(args)) and (need.even_default or args.get(name) != flag.default):
            found.append(f"--{name} has no effect without {need.sentence}")
    return found


def _timestep_bias(args: Arguments) -> list[str]:
    strategy = args.get("timestep_bias_strategy", "none")
    if strategy == "none" or args.timestep_bias_multiplier != 1:
        return []
    return [
        f"--timestep_bias_strategy {strategy} draws all timesteps alike with --timestep_bias_multiplier 1; give it "
        "another one"
    ]


def _warmup(args: Arguments) -> list[str]:
    warmup = args.lr_warmup_steps
    if args.lr_scheduler == "constant":
        if warmup and "lr_warmup_steps" in args.given:
            return ["--lr_scheduler constant has no warm-up; use constant_with_warmup for --lr_warmup_steps"]
    elif args.max_train_steps and warmup >= args.max_train_steps:
        return [
            f"--lr_warmup_steps {warmup} leaves nothing after the warm-up in {args.max_train_steps} steps: the "
            "learning rate never gets to --learning_rate"
        ]
    return []


def _output_folder(args: Arguments) -> list[str]:
    if not args.train_data_dir or not args.output_dir:
        return []
    folder = os.path.join(os.path.realpath(args.train_data_dir), "")
    if not os.path.realpath(args.output_dir).startswith(folder):
        return []
    return [
        f"--output_dir {args.output_dir} lies in --train_data_dir: a later run would take the images that this one "
        "draws for data, unless metadata name those that are meant"
    ]


def _learning_rate(args: Arguments) -> list[str]:
    name = args.get("optimizer")
    best = OPTIMIZERS[name].made_for_learning_rate if name is not None else None
    if best is None or args.learning_rate == best:
        return []
    return [
        f"--optimizer {name} multiplies the step size that it finds by --learning_rate {args.learning_rate:g}; it is "
        f"made for --learning_rate {best:g}"
    ]
