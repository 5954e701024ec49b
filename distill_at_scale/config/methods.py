"""The section `distill`: what all methods share, and a section per method with its published protocol as defaults.

The constants are those of METHOD.md section 4, from the methods' papers and official code.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_at_scale.config.sections import MAX_LR, Section

SIAMESE_AUGMENT = "color_crop_cutout_flip_scale_rotate"


class DCSection(Section):
    """Gradient matching (METHOD.md section 4, DC)."""

    image_lr: float = Field(0.1, gt=0, le=MAX_LR)
    image_momentum: float = Field(0.5, ge=0, lt=1)
    network_lr: float = Field(0.01, gt=0, le=MAX_LR)
    outer: int | None = Field(None, ge=1)  # default by images per class: 1, 10, 50
    inner: int | None = Field(None, ge=1)  # default by images per class: 1, 50, 10
    real_batch: int = Field(256, ge=1)  # per class; at most what is kept of the class
    network_batch: int = Field(256, ge=1)
    init: Literal["noise", "real"] = "noise"
    augment: str = "none"


class DSASection(DCSection):
    init: Literal["noise", "real"] = "real"
    augment: str = SIAMESE_AUGMENT


class DMSection(Section):
    """Distribution matching (METHOD.md section 4, DM)."""

    image_lr: float | None = Field(None, gt=0, le=MAX_LR)  # default 1, and 10 from 100 images per class on
    image_momentum: float = Field(0.5, ge=0, lt=1)
    real_batch: int = Field(256, ge=1)
    init: Literal["noise", "real"] = "real"
    augment: str = SIAMESE_AUGMENT


class IDCSection(Section):
    """Multi-formation matching with networks trained on real data (IDC, arXiv 2205.14959)."""

    image_lr: float = Field(5e-3, gt=0, le=MAX_LR)
    image_momentum: float = Field(0.5, ge=0, lt=1)
    factor: int = Field(2, ge=1, le=8)  # an image holds factor x factor training images; 3 on ImageNet
    metric: Literal["mse", "l1"] = "mse"  # between gradients; l1 on MNIST-like sets and ImageNet
    inner: int = Field(100, ge=1)  # image updates under one network, each followed by training it on real data
    real_batch: int = Field(64, ge=1)  # per class
    synthetic_batch: int = Field(128, ge=1)  # decoded images per class, at most
    network_lr: float = Field(0.01, gt=0, le=MAX_LR)
    network_momentum: float = Field(0.9, ge=0, lt=1)
    network_weight_decay: float = Field(5e-4, ge=0)
    network_samples: int = Field(2000, ge=1)  # real samples per inner iteration
    network_batch: int = Field(128, ge=1)
    network_cutmix: float = Field(1.0, ge=0, le=1)  # the share of its batches that are cut and mixed
    init: Literal["noise", "real"] = "real"
    augment: str = "color_crop_cutout"
    student_augment: str = "color_crop_flip_scale_rotate"  # of evaluation networks; no flip for digits
    student_cutmix: float = Field(0.5, ge=0, le=1)  # the share of their batches that are cut and mixed


class MTTSection(Section):
    """Matching training trajectories (MTT, arXiv 2203.11932)."""

    image_lr: float = Field(1000.0, gt=0, le=MAX_LR)
    image_momentum: float = Field(0.5, ge=0, lt=1)
    student_lr: float = Field(0.01, gt=0, le=MAX_LR)  # where the learned rate starts
    student_lr_rate: float = Field(1e-5, ge=0, le=MAX_LR)  # how fast it is learned
    student_steps: int = Field(20, ge=1)  # on synthetic data, from an expert's epoch
    student_batch: int | None = Field(None, ge=1)  # synthetic images per step; null: all of them
    target_epochs: int = Field(3, ge=1)  # how many epochs later the expert is to be met
    max_start: int = Field(25, ge=0)  # the last epoch to start from
    experts: int = Field(100, ge=1)
    expert_epochs: int = Field(50, ge=1)
    expert_batch: int = Field(256, ge=1)
    expert_lr: float = Field(0.01, gt=0, le=MAX_LR)
    expert_momentum: float = Field(0.0, ge=0, lt=1)
    expert_weight_decay: float = Field(0.0, ge=0)
    expert_augment: str = SIAMESE_AUGMENT
    init: Literal["noise", "real"] = "real"
    augment: str = SIAMESE_AUGMENT

    @model_validator(mode="after")
    def _experts_last_long_enough(self) -> MTTSection:
        if self.max_start + self.target_epochs > self.expert_epochs:
            raise ValueError(
                f"max_start + target_epochs is {self.max_start + self.target_epochs}, after the last of {self.expert_epochs} "
                "expert_epochs; lower max_start or target_epochs"
            )
        return self


class TESLASection(MTTSection):
    """TESLA (arXiv 2211.10586): MTT's gradient with memory constant in student_steps, and learned soft labels."""

    gradient: Literal["exact", "fixed"] = (
        "exact"  # fixed: the paper's own, which leaves out the path through later steps
    )
    learn_labels: bool = True
    label_lr: float = Field(1.0, ge=0, le=MAX_LR)  # of the soft labels' logits
    label_init: Literal["experts", "class"] = (
        "experts"  # the experts' mean logits for real images, or 5 for the own class
    )


class TeacherSection(Section):
    """A teacher trained on the kept samples (or ready-made), and the soft labels that it gives."""

    teacher_network: str = "resnet18_bn"
    teacher_weights: str | None = None  # ready-made: a file or torchvision's name, as in score.weights
    teacher_epochs: int = Field(50, ge=1)
    teacher_batch: int = Field(128, ge=1)
    teacher_lr: float = Field(0.05, gt=0, le=MAX_LR)
    teacher_momentum: float = Field(0.9, ge=0, lt=1)
    teacher_weight_decay: float = Field(5e-4, ge=0)
    teacher_augment: str = "color_crop_cutout_flip_scale_rotate"
    label_epochs: int = Field(300, ge=1)  # epochs of student training for which every view gets its label
    temperature: float = Field(20.0, gt=0)
    top_k: int | None = Field(None, ge=1)  # classes per soft label that are stored; null: all
    view_scale: float = Field(
        0.08, gt=0, le=1
    )  # the smallest share of an image that a view shows (random resized crop)
    cutmix: float = Field(1.0, ge=0, le=1)  # the share of batches that are cut and mixed
    student_optimizer: Literal["sgd", "adamw"] = "adamw"
    student_lr: float = Field(1e-3, gt=0, le=MAX_LR)
    student_batch: int = Field(64, ge=1)


class SRe2LSection(TeacherSection):
    """Squeeze, recover, relabel (SRe2L, arXiv 2306.13092)."""

    image_lr: float = Field(0.25, gt=0, le=MAX_LR)
    beta1: float = Field(0.5, ge=0, lt=1)  # of Adam
    beta2: float = Field(0.9, ge=0, lt=1)
    statistics: float = Field(0.01, ge=0)  # weight of matching the batch norm statistics
    recover_batch: int = Field(100, ge=1)  # synthetic images that go through the teacher together
    recover_scale: float = Field(0.08, gt=0, le=1)  # smallest share of an image in the crops of recovery
    init: Literal["noise", "real"] = "noise"


class RDEDSection(TeacherSection):
    """Realistic, diverse, efficient: patches of real images (RDED, arXiv 2312.03526)."""

    factor: int = Field(2, ge=1, le=8)  # an image shows factor x factor patches
    crops: int = Field(5, ge=1)  # per real image, of which the most realistic one counts
    candidates: int = Field(300, ge=1)  # real images per class, at most
    crop_scale: float = Field(0.5, gt=0, le=1)  # the smallest share of an image that a patch shows


class DistillSection(Section):
    method: str = "dc"
    ipc: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)  # default: the method's own
    workers: int | list[int] = 1  # or [least, most]: as many as find room, fewer or more when that changes
    seed: int | None = Field(None, ge=0)  # default run.seed; another one repeats the distillation from the same scores
    network: str = "convnet"
    width: int = Field(128, ge=1)
    depth: int | None = Field(None, ge=1, le=8)
    evaluate_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(50, ge=1)  # steps; also about once a minute (checkpoint.py)
    hold: Literal["auto", "device", "host", "shards"] = "auto"  # where the kept samples lie; auto: by what fits
    dc: DCSection = DCSection()
    dsa: DSASection = DSASection()
    dm: DMSection = DMSection()
    idc: IDCSection = IDCSection()
    mtt: MTTSection = MTTSection()
    tesla: TESLASection = TESLASection()
    sre2l: SRe2LSection = SRe2LSection()
    rded: RDEDSection = RDEDSection()
    options: dict[str, Any] = Field({})  # for a method of your own (package.module:Object)

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_fit(cls, value: Any) -> Any:
        bounds = value if isinstance(value, list) and len(value) == 2 else [value, value]
        if not all(type(bound) is int for bound in bounds) or not 1 <= bounds[0] <= bounds[1]:
            raise ValueError("it should be a number from 1 on, or [least, most] with 1 <= least <= most")
        return value

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]
