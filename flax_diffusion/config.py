"""The settings of a part of a model, its config.json, and the check that all of them are supported here."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


class ModelError(ValueError):
    """A model that cannot be read or computed, in one sentence that names the part and the setting."""


class Config(Mapping[str, Any]):
    """The settings of a part, read by key or as attributes. Hashable, so that jit can tell modules apart."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)

    def __getitem__(self, name: str) -> Any:
        return self._settings[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._settings:
            raise AttributeError(name)
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __hash__(self) -> int:
        return hash(json.dumps(self._settings, sort_keys=True))

    def __repr__(self) -> str:
        return f"Config({self._settings})"


# Settings in the config.json of old Flax models only.
FLAX_ONLY = ("dtype", "use_memory_efficient_attention", "split_head_dim")
# Settings of a moving average of the weights, which diffusers writes beside those of the network.
EMA_ONLY = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
# Settings without an effect on what is computed here. Softmax is float32 in any case, which is what the two upcast
# settings ask for; a network with an added embedding is refused by the setting that names its kind.
NO_EFFECT = {
    *FLAX_ONLY,
    *EMA_ONLY,
    "sample_size",
    "force_upcast",
    "upcast_attention",
    "addition_embed_type_num_heads",
}


def checked_config(
    part: str,
    settings: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    supported: Mapping[str, tuple],
    strict: bool,
) -> Config:
    """The settings over their defaults, once all of them are known to be supported.

    supported: for each setting that is fixed, the values that it may have, its default first. strict: also refuse
    settings of unknown names unless they are null or false, because a network that needs them is another one.
    Raises ModelError that names the setting.
    """
    for name, value in settings.items():
        if name in supported and value not in supported[name]:
            raise ModelError(
                f"{part}: the setting {name} = {value!r} is not supported, only {supported[name][0]!r} is"
            )
        known = name in supported or name in defaults or name in NO_EFFECT or name.startswith("_")
        if strict and not known and value not in (None, False):
            raise ModelError(f"{part}: the setting {name} = {value!r} is not known here, so it cannot be computed")
    return Config(dict(defaults) | dict(settings))


def check_block_lists(part: str, config: Config, supported: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse lists of blocks with another length, with unsupported types, or with channels that cannot be grouped.

    supported: for each setting that lists blocks, the types of blocks that it may hold. Raises ModelError.
    """
    for name, block_types in supported.items():
        if len(config[name]) != len(config["block_out_channels"]):
            raise ModelError(f"{part}: {name} has another length than block_out_channels")
        for block_type in config[name]:
            if block_type not in block_types:
                raise ModelError(f"{part}: the block type {block_type!r} in {name} is not supported")
    groups = config["norm_num_groups"]
    for channels in config["block_out_channels"]:
        if not isinstance(groups, int) or channels % groups:
            raise ModelError(f"{part}: norm_num_groups = {groups!r} does not divide {channels} channels")


def for_each_block(value: Any, count: int) -> tuple:
    """A setting for each of `count` blocks, where it is given once for all or as a list."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,) * count
