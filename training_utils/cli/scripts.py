"""The nine scripts: what each of them trains, and with which library."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """One script. `family` is the kind of base model, `backend` "torch" or "jax", `trains` "weights" or "adapters"."""

    name: str
    family: str
    trains: str
    backend: str = "torch"

    @property
    def network(self) -> str:
        """The network that is trained: "unet", or the "prior" of Kandinsky."""
        return "prior" if self.family == "kandinsky prior" else "unet"


SCRIPTS = {
    script.name: script
    for script in (
        Script("train_text_to_image", "stable diffusion", "weights"),
        Script("train_text_to_image_lora", "stable diffusion", "adapters"),
        Script("train_text_to_image_sdxl", "sdxl", "weights"),
        Script("train_text_to_image_lora_sdxl", "sdxl", "adapters"),
        Script("train_text_to_image_prior", "kandinsky prior", "weights"),
        Script("train_text_to_image_lora_prior", "kandinsky prior", "adapters"),
        Script("train_text_to_image_decoder", "kandinsky decoder", "weights"),
        Script("train_text_to_image_lora_decoder", "kandinsky decoder", "adapters"),
        Script("train_text_to_image_flax", "stable diffusion", "weights", backend="jax"),
    )
}


def _named(**facts: str) -> frozenset[str]:
    """The names of the scripts that these facts are true of."""
    return frozenset(
        name for name, script in SCRIPTS.items() if all(getattr(script, key) == fact for key, fact in facts.items())
    )


# Sets of names, by which a row of the flag table says who has the flag.
EVERY = frozenset(SCRIPTS)
TORCH = _named(backend="torch")
JAX = _named(backend="jax")
FULL = _named(trains="weights")
ADAPTERS = _named(trains="adapters")
STABLE_DIFFUSION = _named(family="stable diffusion")
SDXL = _named(family="sdxl")
PRIORS = _named(family="kandinsky prior")
DECODERS = _named(family="kandinsky decoder")
KANDINSKY = PRIORS | DECODERS
