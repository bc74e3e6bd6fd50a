"""Settings of ``pavdm train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pavdm_dist.train.objective import Objective
from pavdm_dist.values.fields import TextDevice, TextDtype


@dataclass
class CodecSettings:
    """The small causal video VAE (AutoencoderKLWan layout); see ``digits.codec_training.CodecTraining``."""

    folder: str | None = None  # a trained codec, or a shipped model, whose it is then; None trains one in run_dir
    base_dim: int = 16  # width of the encoder's finest level
    decoder_base_dim: int = 24  # the same of the decoder, which limits how sharp edges become
    z_dim: int = 16  # latent channels
    dim_mult: list[int] = field(default_factory=lambda: [1, 4, 4])  # widths of the three levels, in the finest one's
    batch_size: int = 4  # clips
    learning_rate: float = 2e-3  # peak
    budget_seconds: float = 5400.0  # encoder and decoder together
    decoder_seconds: float = 1500.0  # then the decoder alone
    bfloat16: bool = True  # convolutions compute in it


@dataclass
class WorldConfig:
    """The world of moving digits; see ``digits.settings.DigitWorld``. Its defaults are the shipped model's world."""

    size: int = 64  # of the pictures, px; a multiple of 8
    cell: float = 3.5  # px per pixel of the 8x8 handwriting: a digit is 8 of them high
    most_digits: int = 2  # of a scene
    clearest_fraction: float = 0.12  # share of the handwriting that is used, the clearest first; 1 = all that is clear
    colours: list[str] = field(default_factory=list)  # that digits have; [] = all seven
    speeds: list[float] = field(default_factory=lambda: [8.0, 18.0, 36.0])  # px/s: slowly, without a word, fast
    digit_weights: list[float] = field(default_factory=list)  # how often scenes of 1, 2, ... digits come; [] = alike


@dataclass
class QualityConfig:
    """How good the exported model is, read back from its pixels at the end of every slice; of the digit world."""

    prompts: int = 0  # held-out ones of each number of digits, a video each; 0 = nothing is looked at
    stills: int = 0  # pictures of each number of digits
    video_seconds: float = 3.0  # length of each video
    max_seconds: float = 60.0  # of sampling; what there is no time for is left out


@dataclass
class DataConfig:
    """What is trained on: a prepared folder of real video, or clips of moving handwritten digits made here."""

    folder: list[str] = field(default_factory=list)  # of `pavdm data prepare`, one or several; [] = digits made here
    model: str | None = None  # whose codec and text encoder prepared it; None: model.pretrained, or the embedded one
    text_device: TextDevice = "auto"  # of that model's text encoder where it is a pretrained one, as in `pavdm sample`
    text_dtype: TextDtype = "bfloat16"  # what the folder was prepared with
    text_cache: str | None = None  # folder of what it has encoded; null = this user's
    pixels: bool = False  # read the videos and encode them now, instead of cached latents
    batch_size: int = 8  # of all processes together, over all accumulated parts
    batch_sizes: dict[str, int] = field(default_factory=dict)  # of single buckets, by their names
    prefetch: int = 2  # batches loaded ahead, with a folder
    clips: int = 640  # digits; whole shards of 32
    num_latents: int = 40  # digits, per clip: 8 chunks of 5, 157 frames
    still_steps: int = 0  # digits: steps on single latent frames before the first window
    still_share: float = 0.0  # digits: share of the steps after them that see single latent frames too
    still_batch_size: int = 128  # digits: single latent frames of such a step

    @property
    def described(self) -> str:
        """What is trained on, for people."""
        return ", ".join(self.folder) or "moving digits, made here (data.folder is not set)"


@dataclass
class LowRankConfig:
    """Low-rank changes of a pretrained model's linear maps, trained in place of its weights."""

    rank: int = 0  # 0 = all weights are trained
    alpha: float | None = None  # changes count alpha / rank; None: as much as the rank
    targets: list[str] = field(default_factory=list)  # ends of names in blocks (to_q), or whole names; [] = all in them


@dataclass
class ModelConfig:
    """What is trained: a pretrained model of any backbone, or an STDiT3 of these sizes from nothing."""

    pretrained: str | None = None  # model folder or hub id to start from; its sizes count, not those below
    lora: LowRankConfig = field(default_factory=LowRankConfig)
    # STDiT3's sizes, named as in its config.json, and the text encoder's depth
    depth: int = 4  # blocks
    hidden_size: int = 160  # width of the tokens
    num_heads: int = 5  # of attention
    caption_channels: int = 96  # with data.folder: the width of its text
    model_max_length: int = 32  # tokens of a text at most
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])  # latent frames, height, width that make a token
    text_depth: int = 2  # layers of the text encoder


@dataclass
class OptimizerConfig:
    """Linear warm-up, then cosine to ``final_ratio`` of the peak; average of the weights (EMA)."""

    # muon: Muon for matrices, AdamW for the rest, needs zero.stage=0; adamw: torch's; deepspeed: the one that the
    # "optimizer" block of `deepspeed` names.
    name: Literal["muon", "adamw", "deepspeed"] = "muon"
    lr: float = 1e-3  # peak learning rate, AdamW's with muon
    matrix_ratio: float = 2.0  # Muon's learning rate over AdamW's
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # of AdamW
    weight_decay: float = 0.0  # decoupled
    grad_clip: float = 1.0  # largest norm of the gradients; 0 = any
    accumulation: int = 1  # parts that a batch is worked off in
    total_steps: int = 5000  # at which training is done
    warmup_steps: int = 200  # of linear increase
    final_ratio: float = 0.02  # learning rate at the end, over the peak
    ema_decay: float = 0.999  # of the averaged weights; 0 = the newest ones alone


@dataclass
class ZeroConfig:
    """What DeepSpeed shards and where it keeps it.

    Attributes:
        stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
        precision: float32; autocast = forward pass in bfloat16, weights float32; bfloat16 = weights in bfloat16 with
            float32 masters (stages 1 to 3).
        offload: keep the optimizer's state, or with stage 3 the weights too, in main memory.
        init: build the model already sharded, for models that fit no single device (stage 3).
        recompute: which blocks the backward pass computes again instead of keeping their insides: none, every:N (every
            N-th, every:1 = all) or budget:GiB (as few as keep the rest within so much memory of a device).
        gradients: what gradients are added up and sent in; auto = the type of the weights.
        bucket_elements: numbers per message of gradients (2e8 as in DeepSpeed: 0.8 GB of float32).
    """

    stage: int = 0
    precision: Literal["float32", "autocast", "bfloat16"] = "float32"
    offload: Literal["none", "optimizer", "all"] = "none"
    init: bool = False
    recompute: str = "none"
    gradients: Literal["auto", "float32"] = "auto"
    bucket_elements: int = 200_000_000


@dataclass
class ValidationConfig:
    """The loss on clips that are not trained on."""

    every_steps: int = 0  # 0 = never
    batches: int = 8  # the same ones every time
    clips: int = 0  # of each bucket that has more, its last ones: never trained on


@dataclass
class LaunchConfig:
    """Processes of this machine, or workers of a Ray cluster; without effect under a launcher that started several."""

    processes: int = 1  # on this machine
    ray_workers: int = 0  # on a Ray cluster, by Ray Train
    ray_address: str | None = None  # None: RAY_ADDRESS, or a cluster on this machine
    gpus_per_worker: float = 0.0  # of Ray's
    cpus_per_worker: float = 1.0  # Ray's logical CPUs
    placement_timeout_s: float = 60.0  # how long resources that others hold, or an autoscaler brings, are waited for
    max_failures: int = 3  # restarts of the group after a worker died
    timeout_seconds: float = 1800.0  # of a collective, before a missing process ends the run


@dataclass
class TrainConfig:
    """Everything ``pavdm train`` knows."""

    run_dir: str = "runs/embedded"  # folder of the run: checkpoints, logs, cached clips
    export: str | None = None  # folder for the finished model; None = run_dir/model
    export_weights: Literal["average", "current"] = "average"  # the EMA, or the newest ones
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of what has no need of float32
    seed: int = 0  # of weights, data and noise
    resume: Literal["auto", "must", "never"] = "auto"  # auto: go on from a checkpoint if there is one
    max_seconds: float = 600.0  # length of one slice; run again to go on
    threads: int = 2  # of torch, in each process
    checkpoint_every_seconds: float = 120.0  # and at the end of a slice
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every_steps: int = 0  # checkpoints at multiples of this are kept for good; 0 = none
    sheet_every_seconds: float = 300.0  # between two sheets of sampled pictures; 0 = none
    log_every_steps: int = 20  # steps between two lines of the log
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb: told what the log is told
    profile_steps: list[int] = field(default_factory=list)  # [first, count]: these are recorded by torch's profiler
    peak_tflops: float | None = None  # of a device, in the type that is computed in; None: if it is a known one
    compile: bool = False  # blocks run as compiled functions (torch.compile), for GPUs; zero.stage 0 to 2
    sequence_parallel: int = 1  # processes that share every window, a part of its frames each
    world: WorldConfig = field(default_factory=WorldConfig)
    codec: CodecSettings = field(default_factory=CodecSettings)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Objective = field(default_factory=Objective)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults stored with the exported model
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further DeepSpeed settings
    deepspeed_config: str | None = None  # the same as a JSON file
