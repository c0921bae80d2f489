"""The three networks of Stable Diffusion 1.x and 2.x, by the names of their folders."""

from .autoencoder import FlaxAutoencoderKL
from .network import Network
from .text_encoder import FlaxCLIPTextModel
from .unet import FlaxUNet2DConditionModel

PARTS: dict[str, type[Network]] = {
    network.part: network for network in (FlaxCLIPTextModel, FlaxAutoencoderKL, FlaxUNet2DConditionModel)
}
