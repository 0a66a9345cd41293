"""The configuration tree: every number that a run depends on, with its explanation.

`python pipeline/train.py --help` shows it, presets fill it, a YAML file or the command line overrides it
(`pipeline/config/files.py`), and every run saves it resolved as `config.yaml`. Needs the standard library alone.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints

from data_shards.errors import UserError
from models.ops import STDDEV_GROUP_SIZE

MIN_RESOLUTION, MAX_RESOLUTION = 32, 1024


class Bounds(NamedTuple):
    """Least and greatest value of a field."""

    low: float
    high: float = math.inf


Weight = Annotated[float, Bounds(0, sys.float_info.max)]
Share = Annotated[float, Bounds(0, 1)]
Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(1e-12, sys.float_info.max)]
Precision = Literal["auto", "fp32", "bf16"]


class _Section:
    # Read by pydantic when a file is validated: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Sizes of the networks."""

    channel_base: Count = 32768
    """Feature channels are min(channel_max, channel_base / resolution); 32768 is StyleGAN2's 'config f'."""
    channel_max: Annotated[int, Bounds(16)] = 512
    """Most feature channels of the discriminator; the foreground generator has 3/4 of them, the background 1/4."""
    z_dim: Count = 384
    """Length of the foreground latent z."""
    z_dim_background: Count = 128
    """The background latent is this many first entries of the same z."""
    fine_mask: bool = True
    """The fine mask network; without it the mask is the coarse one alone (ablation of Table 1)."""
    mask_predictor: bool = True
    """The discriminator's mask predictor; without it there is neither L_pred nor L_cons."""


@dataclass(frozen=True)
class LossConfig(_Section):
    """Weights, thresholds and intervals of the losses (paper, section 3.3)."""

    dual_fake_input: bool = True
    """Half of the fakes are foregrounds (section 3.1); without it all are composites (ablation of figure 7)."""
    r1: Weight = 1.0
    """gamma of R1; the penalty is weighted gamma / 2 * r1_interval."""
    r1_interval: Count = 16
    """Iterations between R1 steps (lazy regularisation)."""
    prediction: Weight = 1.0
    """Weight of L_pred (Eq. 4): trains the mask predictor."""
    consistency: Weight = 1.0
    """Weight of L_cons (Eq. 5); not rescaled by its interval. 0: not computed (ablation of Table 1)."""
    consistency_interval: Count = 2
    """Iterations between uses of L_cons."""
    consistency_start: CountOrZero = 0
    """First iteration of L_cons; the unaligned recipe waits 5,000."""
    binarization_start: Weight = 5.0
    """lambda_bin at iteration 0 (Eq. 8)."""
    binarization_end: Weight = 0.5
    """lambda_bin after its decay; the unaligned recipe keeps 2.0."""
    binarization_iterations: CountOrZero = 5000
    """Iterations of the linear decay of lambda_bin."""
    area: Weight = 5.0
    """lambda_area (Eq. 8)."""
    phi1: Share = 0.35
    """Least area of the coarse mask (Eq. 7)."""
    area_over_batch: bool = False
    """One area hinge on the mean over the global batch (unaligned recipe) instead of one an image."""
    fine: Weight = 5.0
    """lambda_fine: weight of L_fine (Eq. 9)."""
    phi2: Share = 0.01
    """Most area that the fine mask may add (Eq. 9)."""
    participation: Weight = 1.0
    """Weight of L_bgp (Eq. 10); not rescaled by its interval. 0: not computed (ablation of Table 1)."""
    participation_interval: Count = 2
    """Iterations between uses of L_bgp."""
    scribble: Weight = 10.0
    """Weight of the terms that --scribbles adds: L_scribble of the mask predictor and L_follow of the masks."""
    fade_in_iterations: CountOrZero = 5000
    """Iterations over which the fine mask fades in (gamma of Eq. 3)."""


@dataclass(frozen=True)
class OptimizerConfig(_Section):
    """Adam and the average of the generator."""

    learning_rate: Positive = 0.002
    """Before the lazy scaling: G takes 4/5 of it, D 16/17 (r1_interval / (r1_interval + 1))."""
    ema_halflife_images: Positive = 5000.0
    """Half-life of the generator's exponential moving average, in images."""
    ema_rampup: Positive | None = None
    """The half-life is at most this share of the images seen; None: constant, as in the paper."""


@dataclass(frozen=True)
class LogConfig(_Section):
    """What a run records, and how often; intervals count images seen."""

    metrics_interval_images: Count = 8_000
    """Between rows of metrics.jsonl."""
    grid_interval_images: Count = 200_000
    """Between sample grids."""
    checkpoint_interval_images: Count = 200_000
    """Between checkpoints."""
    keep_checkpoints: Count = 3
    """Newest checkpoints to keep; the best one is kept besides."""
    grid_columns: Annotated[int, Bounds(1, 32)] = 8
    """Latents in a sample grid."""
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    """MLflow store: a database or a tracking server; 'none' for metrics.jsonl alone. What it misses while it is away is
    sent when it answers again, at the latest by --resume."""
    experiment: str = "furrygan"
    """MLflow experiment."""
    tags: dict[str, str] = field(default_factory=dict)
    """MLflow tags of the run, to filter by: --log.tags KEY VALUE KEY VALUE ..."""
    profile_at: CountOrZero | None = None
    """Iteration, from 0, of which rank 0 writes a trace: trace-ITERATION.json.gz in the run's directory, for
    ui.perfetto.dev. The first ones after a start are not typical: they choose algorithms and record graphs."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """Where a checkpoint, image or row of metrics cannot be written (a full disk): 'continue' says so, trains on and
    tries again at the next one, and a run whose last state is not saved in the end fails; 'stop' ends it at once."""


@dataclass(frozen=True)
class EvaluationConfig(_Section):
    """Mask metrics against pseudo ground truth; where shards carry alpha."""

    num_samples: Count = 256
    """Generated foregrounds of the evaluation at each checkpoint."""
    num_samples_final: Count = 1000
    """Generated foregrounds of the last evaluation."""
    threshold: Share = 0.5
    """Alpha above it is foreground."""
    segmenter_images: Annotated[int, Bounds(8)] = 4096
    """Most images that the pseudo-ground-truth segmenter is fitted on; an eighth is held out."""
    segmenter_steps: Count = 600
    """Optimizer steps of that fit."""
    unlabelled: bool = False
    """Measure a score that needs no labels (docs/objective.md) besides, at each checkpoint."""


@dataclass(frozen=True)
class Config(_Section):
    """Everything that a training run depends on."""

    dataset: str = "furballs"
    """Preset that the other fields start from."""
    data: str | None = None
    """Directory of WebDataset shards, or its URL: s3://, gs://, http:// (any that fsspec knows; see cache_dir). Without
    it the furballs preset draws its own."""
    scribbles: Path | None = None
    """Directory of a few images NAME.png, each with NAME.scribble.png: green strokes on the foreground, red ones on
    the background. They decide what is ambiguous."""
    verify_data: bool = True
    """Check the sha256 of every shard before training, where the set has a manifest. Fetched ones always are."""
    resolution: int = 256
    """Side of the square images in pixels: a power of two from 32 to 1024."""
    batch: Count = 16
    """Images a step over all ranks; a multiple of 4 times the ranks."""
    accumulate: Count = 1
    """Micro-batches that a rank computes a step in, one after the other: less memory, the same numbers."""
    backend: Literal["ddp", "deepspeed"] = "ddp"
    """Who keeps the ranks in step: torch's DistributedDataParallel, or DeepSpeed. The numbers are the same."""
    zero_stage: Annotated[int, Bounds(0, 2)] = 0
    """What DeepSpeed parts among the ranks: 0 nothing, 1 Adam's state, 2 Adam's state and gradients."""
    steps: Count = 300_000
    """Iterations to train in all."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """All randomness of the run derives from it."""
    run_dir: Path | None = None
    """Where the run is kept; runs/<dataset>-<time> by default. One that holds a run resumes it."""
    loader: Literal["auto", "dali", "webdataset"] = "auto"
    """Who decodes: NVIDIA DALI, or webdataset where DALI is not available."""
    flip: bool = True
    """Mirror half of the training images."""
    num_images: Count = 4096
    """How many furballs to draw when there is no --data."""
    cache_dir: Path = Path("shards")
    """Where furballs, fitted segmenters and fetched shards are kept between runs."""
    fetched_gb: Positive = 100.0
    """Most gigabytes of fetched shards to keep. A set that fits is shuffled whole, a larger one by windows of shards:
    that in use and the next one must fit."""
    precision: Precision = "auto"
    """Of convolutions and activations; auto: bf16 on GPUs that have it, else fp32. Statistics, masks, RGB, losses and
    Adam are always fp32, and so is R1 on CPUs."""
    recompute: bool = False
    """Compute the layers' activations again in the backward pass instead of keeping them: less memory, more time."""
    cuda_graphs: bool = True
    """On a GPU, record the phases as CUDA graphs, which the host starts by one call each."""
    deterministic: bool = False
    """The same bits each time on the same GPU, of a resumed run too: deterministic algorithms, chosen without timing
    them. Slower. An operator that has no such algorithm ends the run. On a CPU the bits are the same either way."""
    num_threads: CountOrZero = 0
    """CPU threads of a process; 0 shares the cores among the processes of this machine."""
    collective_timeout_s: Annotated[int, Bounds(1, 1e6)] = 600
    """Seconds that a rank waits for one that neither answers nor is known to be gone, before it ends."""
    heartbeat_timeout_s: Annotated[int, Bounds(5, 1e6)] = 30
    """Seconds without a sign of life after which the machine of another rank is gone, and this rank ends. One that is
    only busy does not fall silent."""
    drift_interval: Count = 500
    """Iterations between comparisons of the ranks' weights, which must be equal; each checkpoint is preceded by one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the networks."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights, thresholds and intervals of the losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam and the average of the generator."""
    log: LogConfig = field(default_factory=LogConfig)
    """What a run records, and how often."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Mask metrics."""

    def __post_init__(self) -> None:
        if self.zero_stage == 3:
            raise UserError(
                "zero_stage 3 is not possible: it parts the weights too, and gathers a layer's for its forward and its "
                "backward pass, not for R1's second derivative; give 0, 1 or 2"
            )
        for name, value, bounds in _bounded_fields(self):
            if not bounds.low <= value <= bounds.high:
                low, high = (f"{bound:.10g}" for bound in bounds)
                limit = f"{low} to {high}" if bounds.high < sys.float_info.max else f"a finite number, at least {low}"
                raise UserError(f"config key {name!r}: {value} is out of bounds, give {limit}")
        if self.dataset not in PRESETS:
            raise UserError(f"dataset {self.dataset!r} is unknown: choose one of {', '.join(PRESETS)}")
        if not MIN_RESOLUTION <= self.resolution <= MAX_RESOLUTION or self.resolution & (self.resolution - 1):
            raise UserError(
                f"resolution {self.resolution} is invalid: "
                f"give a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}"
            )
        if self.batch % STDDEV_GROUP_SIZE:
            raise UserError(
                f"batch {self.batch} is invalid: half of it becomes composites and minibatch stddev takes groups of "
                f"{STDDEV_GROUP_SIZE}, so give a multiple of {STDDEV_GROUP_SIZE}"
            )
        if self.batch % (STDDEV_GROUP_SIZE * self.accumulate):
            raise UserError(
                f"batch {self.batch} does not divide into {self.accumulate} micro-batches in groups of "
                f"{STDDEV_GROUP_SIZE}: give --batch a multiple of {STDDEV_GROUP_SIZE * self.accumulate}"
            )
        if self.log.profile_at is not None and self.log.profile_at >= self.steps:
            raise UserError(
                f"log.profile_at {self.log.profile_at} is beyond the last iteration: give 0 to {self.steps - 1}"
            )
        if self.zero_stage and self.backend != "deepspeed":
            raise UserError(
                f"zero_stage {self.zero_stage} is of DeepSpeed: give --backend deepspeed too, or --zero-stage 0"
            )
        if self.scribbles is not None and not (self.model.mask_predictor and self.loss.consistency):
            raise UserError(
                "scribbles teach the mask predictor, and the masks when L_cons is due: leave out --scribbles, "
                "--model.no-mask-predictor or --loss.consistency 0"
            )
        if self.model.channel_base < 4 * self.resolution:
            raise UserError(
                f"model.channel_base {self.model.channel_base} leaves no channels for the background at "
                f"{self.resolution} px: give at least {4 * self.resolution}"
            )
        if self.model.z_dim_background > self.model.z_dim:
            raise UserError(
                f"model.z_dim_background {self.model.z_dim_background} is more than model.z_dim {self.model.z_dim}: "
                "the background latent is the front part of the foreground's"
            )
        if self.data is None and self.dataset != "furballs":
            raise UserError(f"dataset {self.dataset} needs images: give --data with the directory or URL of its shards")


def _unaligned(phi1: float) -> dict[str, Any]:
    """Appendix F. Its phi1 is lost in the text: the values are our guess until a sweep says better."""
    return {
        "loss": {
            "binarization_end": 2.0,
            "consistency_start": 5000,
            "area_over_batch": True,
            "phi1": phi1,
        }
    }


def _furballs() -> dict[str, Any]:
    """Small enough for two CPU cores and a few minutes.

    Four of the paper's constants are different. R1's gamma scales with the number of pixels (Karras et al. 2020, ADA).
    phi1 follows from the area of the animals (0.44). The fine mask fades in, and the average of G warms up, within the
    run. Binarization keeps the paper's schedule, of which 2,000 steps are a part: lambda_bin falls to 3.2.
    """
    return {
        "resolution": 32,
        "steps": 2000,
        "model": {"channel_base": 1024, "channel_max": 64},
        "loss": {"r1": 0.05, "phi1": 0.38, "fade_in_iterations": 1500},
        "optimizer": {"ema_rampup": 0.1},
        "log": {
            "metrics_interval_images": 400,
            "grid_interval_images": 8_000,
            "checkpoint_interval_images": 8_000,
        },
    }


PRESETS: dict[str, dict[str, Any]] = {
    "furballs": _furballs(),
    "ffhq": {},
    "afhqv2_cat": {},
    "lsun_horse": _unaligned(phi1=0.2),
    "lsun_church": _unaligned(phi1=0.2),
    "lsun_cat": _unaligned(phi1=0.2),
    "cub": _unaligned(phi1=0.15),
    "compcars": _unaligned(phi1=0.2),
}
"""Overrides of the defaults by dataset; the defaults are the paper's for aligned data at 256 px."""


def preset(dataset: str, **overrides: Any) -> Config:
    """A preset with some top-level fields overridden: `config_io.config_from_dict` for where pydantic is not available.

    Raises:
        UserError: the preset is unknown, or a value is invalid.
    """
    values = PRESETS.get(dataset, {}) | {"dataset": dataset} | overrides
    sections = {f.name: f.default_factory for f in fields(Config) if f.default_factory is not MISSING}
    made = {k: sections[k](**v) if isinstance(v, dict) else v for k, v in values.items()}
    return Config(**made)


def _bounded_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, float, Bounds]]:
    """Dotted name, value and bounds of every bounded field that is set."""
    hints = get_type_hints(type(section), include_extras=True)
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from _bounded_fields(value, f"{prefix}{f.name}.")
        elif value is not None:
            for bounds in (a for part in (hints[f.name], *get_args(hints[f.name])) for a in get_args(part)):
                if isinstance(bounds, Bounds):
                    yield prefix + f.name, value, bounds
