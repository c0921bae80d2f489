"""Groups of flags as shared functions take them: small frozen dataclasses that know nothing of the command line."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataOptions:
    """Where the data are and which columns are read. Exactly one of `dataset_name`, `folder` and `config` is needed;
    `folder` may go with `dataset_name`."""

    dataset_name: str | None = None  # hub id or local path that the datasets library can load
    config_name: str | None = None  # the configuration of that dataset
    folder: str | None = None
    cache_dir: str | None = None  # where downloads are kept
    image_column: str = "image"
    caption_column: str | None = "text"  # None: no captions are read, and none are needed
    repeats_from_folders: bool = False
    config: str | None = None  # a file that names several datasets
    ignore_color_profiles: bool = False  # take the numbers of every image for sRGB
    shuffle_buffer: int | None = None  # samples that are shuffled together in a stream; None: nothing is streamed


@dataclass(frozen=True)
class BucketLimits:
    """The buckets of --aspect_ratio_bucketing: sides in pixels, multiples of `step` from `smallest` to `largest`."""

    resolution: int
    smallest: int
    largest: int
    step: int


@dataclass(frozen=True)
class HubOptions:
    """Whether and how the result and the checkpoints are uploaded."""

    push: bool = False
    model_id: str | None = None  # the repository; None: the name of the output folder
    token: str | None = field(default=None, repr=False)
    private: bool = False
    push_checkpoints: bool = False


@dataclass(frozen=True)
class MachineOptions:
    """How a run uses its machine."""

    output_dir: str
    logging_dir: str
    accumulation: int  # micro-steps per step
    mixed_precision: str | None  # None: what accelerate is configured for
    report_to: str
    process_group_timeout: int  # seconds
    allow_tf32: bool = False
    fused_backward: bool = False


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its settings."""

    name: str = "adamw"
    learning_rate: float = 1e-4  # before `scale_lr`
    scale_lr: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: the gradient is not clipped

    def peak_learning_rate(self, samples_per_step: int) -> float:
        """The learning rate, multiplied by the samples of a step where --scale_lr asks for it."""
        return self.learning_rate * samples_per_step if self.scale_lr else self.learning_rate


@dataclass(frozen=True)
class LearningRateOptions:
    """The shape of the learning rate over the steps of a run."""

    name: str = "constant"
    warmup_steps: int = 500
    cycles: int = 1
    power: float = 1.0


@dataclass(frozen=True)
class ObjectiveOptions:
    """How the loss of a sample is computed, beyond the mean squared error."""

    snr_gamma: float | None = None  # min-SNR weighting; None: every timestep counts alike
    dream_p: float | None = None  # DREAM's exponent; None: plain training


@dataclass(frozen=True)
class TimestepOptions:
    """Which timesteps are drawn more often, as `losses.timestep_probabilities` takes it."""

    strategy: str = "none"
    multiplier: float = 1.0
    portion: float = 0.25  # of the schedule, for `earlier` and `later`
    begin: int = 0  # of `range`
    end: int = 1000  # one past the last


PLAIN = ObjectiveOptions()  # as the validation loss is, whatever is trained


@dataclass(frozen=True)
class ValidationOptions:
    """How validation images are drawn, in the words of the pipelines of Stable Diffusion and SDXL."""

    height: int  # pixels
    width: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of the outputs of frozen networks, and where."""

    images: bool
    captions: bool
    crops: int | None  # of each image; None where the crop is not drawn, or nothing is kept of images
    folder: str | None  # None in a dry run, which keeps nothing
