"""The section `distill`: keys that all methods share, and one section per method. And the sections `runtime` and `evaluate`.

The defaults of a method's section are its published protocol, from its paper and official code.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_at_scale.config.fields import Section, execution_key, later_key
from distill_at_scale.config.sections import MAX_LR

SIAMESE_AUGMENT = "color_crop_cutout_flip_scale_rotate"
Init = Literal["noise", "real"]


class DCSection(Section):
    """Gradient matching (DC, arXiv 2006.05929)."""

    image_lr: float = Field(0.1, gt=0, le=MAX_LR, description="learning rate of the images (SGD)")
    image_momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images")
    network_lr: float = Field(0.01, gt=0, le=MAX_LR, description="learning rate of the inner network")
    outer: int | None = Field(None, ge=1, description="outer loops per step; null: 1, 10, 50 for ipc 1, 10, 50")
    inner: int | None = Field(
        None, ge=1, description="updates of the network per outer loop; null: 1, 50, 10 for ipc 1, 10, 50"
    )
    real_batch: int = Field(256, ge=1, description="real samples per class and step, at most what is kept of the class")
    network_batch: int = Field(256, ge=1, description="batch size of the inner network's training")
    init: Init = Field("noise", description="initial images: noise or real samples")
    augment: str = Field("none", description="siamese augmentation: families joined by _, or none")


class DSASection(DCSection):
    """Gradient matching with differentiable siamese augmentation (DSA, arXiv 2102.08259)."""

    init: Init = Field("real", description="initial images: noise or real samples")
    augment: str = Field(SIAMESE_AUGMENT, description="siamese augmentation: families joined by _, or none")


class DMSection(Section):
    """Distribution matching (DM, arXiv 2110.04181)."""

    image_lr: float | None = Field(
        None, gt=0, le=MAX_LR, description="learning rate of the images; null: 1, and 10 from ipc 100 on"
    )
    image_momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images")
    real_batch: int = Field(256, ge=1, description="real samples per class and step")
    init: Init = Field("real", description="initial images: noise or real samples")
    augment: str = Field(SIAMESE_AUGMENT, description="siamese augmentation: families joined by _, or none")


class IDCSection(Section):
    """Multi-formation matching with networks trained on real data (IDC, arXiv 2205.14959)."""

    image_lr: float = Field(5e-3, gt=0, le=MAX_LR, description="learning rate of the images")
    image_momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images")
    factor: int = Field(2, ge=1, le=8, description="an image holds factor x factor training images; 3 on ImageNet")
    metric: Literal["mse", "l1"] = Field("mse", description="distance of gradients; l1 on MNIST-like sets and ImageNet")
    inner: int = Field(100, ge=1, description="image updates per network, each followed by training of the network")
    real_batch: int = Field(64, ge=1, description="real samples per class and update")
    synthetic_batch: int = Field(128, ge=1, description="largest number of decoded images per class and update")
    network_lr: float = Field(0.01, gt=0, le=MAX_LR, description="learning rate of the network")
    network_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the network")
    network_weight_decay: float = Field(5e-4, ge=0, description="weight decay of the network")
    network_samples: int = Field(2000, ge=1, description="real samples the network trains on per inner iteration")
    network_batch: int = Field(128, ge=1, description="batch size of the network's training")
    network_cutmix: float = Field(1.0, ge=0, le=1, description="share of the network's batches with CutMix")
    init: Init = Field("real", description="initial images: noise or real samples")
    augment: str = Field("color_crop_cutout", description="siamese augmentation: families joined by _, or none")
    student_augment: str = Field(
        "color_crop_flip_scale_rotate", description="augmentation of evaluation networks; no flip for digits"
    )
    student_cutmix: float = Field(0.5, ge=0, le=1, description="share of evaluation batches with CutMix")


class MTTSection(Section):
    """Matching training trajectories (MTT, arXiv 2203.11932)."""

    image_lr: float = Field(1000.0, gt=0, le=MAX_LR, description="learning rate of the images")
    image_momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images")
    student_lr: float = Field(0.01, gt=0, le=MAX_LR, description="initial student learning rate, which is learned")
    student_lr_rate: float = Field(1e-5, ge=0, le=MAX_LR, description="learning rate of the student learning rate")
    student_steps: int = Field(20, ge=1, description="student steps on synthetic data from an expert's epoch")
    student_batch: int | None = Field(None, ge=1, description="synthetic images per student step; null: all")
    target_epochs: int = Field(3, ge=1, description="expert epochs between the start and the target weights")
    max_start: int = Field(25, ge=0, description="last expert epoch to start from")
    experts: int = Field(100, ge=1, description="expert networks to train")
    expert_epochs: int = Field(50, ge=1, description="epochs per expert")
    expert_batch: int = Field(256, ge=1, description="batch size of the experts")
    expert_lr: float = Field(0.01, gt=0, le=MAX_LR, description="learning rate of the experts")
    expert_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the experts")
    expert_weight_decay: float = Field(0.0, ge=0, description="weight decay of the experts")
    expert_augment: str = Field(SIAMESE_AUGMENT, description="augmentation of expert training")
    expert_infobatch: float = later_key(
        0.0,
        in_ids=False,
        ge=0,
        lt=1,
        description="experts: probability to leave a sample of below-mean loss out of an epoch (InfoBatch); 0: off",
    )
    init: Init = Field("real", description="initial images: noise or real samples")
    augment: str = Field(SIAMESE_AUGMENT, description="siamese augmentation: families joined by _, or none")

    @model_validator(mode="after")
    def _experts_last_long_enough(self) -> MTTSection:
        if self.max_start + self.target_epochs > self.expert_epochs:
            raise ValueError(
                f"max_start + target_epochs is {self.max_start + self.target_epochs}, after the last of {self.expert_epochs} "
                "expert_epochs; lower max_start or target_epochs"
            )
        return self


class TESLASection(MTTSection):
    """MTT's gradient with memory constant in student_steps, and learned soft labels (TESLA, arXiv 2211.10586)."""

    gradient: Literal["exact", "fixed"] = Field(
        "exact", description="fixed: the paper's form, which drops the path through later student steps"
    )
    learn_labels: bool = Field(True, description="learn soft labels with the images")
    label_lr: float = Field(1.0, ge=0, le=MAX_LR, description="learning rate of the soft labels' logits")
    label_init: Literal["experts", "class"] = Field(
        "experts",
        description="initial logits. experts: their mean logits for real images; class: 5 for the image's class",
    )


class TeacherSection(Section):
    """A teacher, trained on the kept samples or pretrained, and its soft labels."""

    teacher_network: str = Field("resnet18_bn", description="teacher network")
    teacher_weights: str | None = Field(None, description="a file or torchvision's weight name; null: train a teacher")
    teacher_epochs: int = Field(50, ge=1, description="epochs of teacher training")
    teacher_batch: int = Field(128, ge=1, description="batch size of teacher training")
    teacher_lr: float = Field(0.05, gt=0, le=MAX_LR, description="learning rate of teacher training")
    teacher_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of teacher training")
    teacher_weight_decay: float = Field(5e-4, ge=0, description="weight decay of teacher training")
    teacher_augment: str = Field(SIAMESE_AUGMENT, description="augmentation of teacher training")
    teacher_infobatch: float = later_key(
        0.0,
        in_ids=False,
        ge=0,
        lt=1,
        description="teacher: probability to leave a sample of below-mean loss out of an epoch (InfoBatch); 0: off",
    )
    label_epochs: int = Field(300, ge=1, description="student epochs with a stored soft label for every view")
    temperature: float = Field(20.0, gt=0, description="temperature of the soft labels")
    top_k: int | None = Field(None, ge=1, description="classes to store per soft label; null: all")
    view_scale: float = Field(0.08, gt=0, le=1, description="smallest share of an image in a view (RandomResizedCrop)")
    cutmix: float = Field(1.0, ge=0, le=1, description="share of student batches with CutMix")
    student_optimizer: Literal["sgd", "adamw"] = Field("adamw", description="optimizer of evaluation networks")
    student_lr: float = Field(1e-3, gt=0, le=MAX_LR, description="learning rate of evaluation networks")
    student_batch: int = Field(64, ge=1, description="batch size of evaluation networks")


class SRe2LSection(TeacherSection):
    """Squeeze, recover, relabel (SRe2L, arXiv 2306.13092)."""

    image_lr: float = Field(0.25, gt=0, le=MAX_LR, description="learning rate of the images (Adam)")
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's first beta")
    beta2: float = Field(0.9, ge=0, lt=1, description="Adam's second beta")
    statistics: float = Field(0.01, ge=0, description="weight of matching the batch norm statistics")
    class_statistics: bool = later_key(
        False,
        in_ids=False,
        description="match the statistics of each class's own real images, each class alone (arXiv 2410.15919); else those of "
        "the teacher, in batches that mix classes",
    )
    first_layer: float | None = later_key(
        None,
        in_ids=False,
        ge=0,
        description="weight of the statistics of the first batch norm; null: 10 with class_statistics, else 1",
    )
    recover_batch: int = Field(100, ge=1, description="synthetic images per forward pass of the teacher")
    recover_scale: float = Field(0.08, gt=0, le=1, description="smallest share of an image in a crop of the recovery")
    crop_schedule: Literal["constant", "cosine"] = later_key(
        "constant",
        in_ids=False,
        description="cosine: the smallest crop falls from the whole image to recover_scale during the recovery (CDA)",
    )
    blocks: int = later_key(
        1,
        in_ids=False,
        ge=1,
        description="parts of the recovery, each with a new optimizer; between two the images move towards their start (FADRM)",
    )
    residual: float = later_key(
        0.5,
        in_ids=False,
        ge=0,
        le=1,
        description="share of the images that stays between two blocks; the rest is their start",
    )
    block_sizes: list[int] | None = later_key(
        None,
        in_ids=False,
        description="pixels of a side of the images in each block, such as [200, 224], which repeats; null: data.size",
    )
    init: Literal["noise", "real", "patches"] = Field(
        "noise",
        description="initial images: noise, real samples, or patches: crops of real samples of medium loss under the teacher",
    )

    @field_validator("block_sizes")
    @classmethod
    def _sizes(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or min(value) < 1):
            raise ValueError("name at least one size, each of at least 1 pixel")
        return value


class RDEDSection(TeacherSection):
    """Realistic, diverse, efficient: patches of real images (RDED, arXiv 2312.03526)."""

    factor: int = Field(2, ge=1, le=8, description="an image shows factor x factor patches")
    crops: int = Field(5, ge=1, description="crops per real image; the most realistic one counts")
    candidates: int = Field(300, ge=1, description="largest number of real images per class to crop from")
    crop_scale: float = Field(0.5, gt=0, le=1, description="smallest share of an image that a patch shows")


class CoresetSection(Section):
    """The first kept samples of each class, in the order of the selection's rank, as they are."""

    student_augment: str = Field(
        SIAMESE_AUGMENT,
        description="augmentation of evaluation networks; no flip for digits; none: 300 epochs, not 1000",
    )


class PCASection(Section):
    """Prune, combine, augment: tiles of the first kept images, evaluated with crops of about a tile (arXiv 2502.06434)."""

    factor: int = Field(2, ge=1, le=8, description="an image shows factor x factor kept images, reduced to tiles")
    crop_spread: float = Field(
        2.0,
        ge=1,
        description="crops of evaluation networks have between 1 / crop_spread and crop_spread of a tile's area",
    )
    student_augment: str = Field(
        "flip", description="further augmentation of evaluation networks, besides the crops; no flip for digits"
    )
    student_cutmix: float = Field(0.0, ge=0, le=1, description="share of evaluation batches with CutMix")


class DistillSection(Section):
    """The method, the size of the synthetic set, and how the loop runs."""

    method: str = Field("dc", description="a method's name or package.module:Object")
    ipc: int = Field(1, ge=1, description="synthetic images per class")
    steps: int | None = Field(None, ge=1, description="outer updates; null: the method's default")
    workers: int | list[int] = execution_key(
        1, description="workers, or [fewest, most]: as many as fit, changing with the cluster"
    )
    seed: int | None = Field(None, ge=0, description="seed of the distillation; null: run.seed")
    network: str = Field("convnet", description="network to match with: a name or package.module:Object")
    width: int = Field(128, ge=1, description="channels of that network")
    depth: int | None = Field(None, ge=1, le=8, description="blocks of that network; null: by image size")
    precision: Literal["auto", "fp32", "bf16"] = later_key(
        "auto",
        earlier="fp32",
        description="precision of teachers, experts and, if compiled, forward passes of real data; "
        "auto: bf16 on GPUs and on CPUs with bf16 units, else fp32",
    )
    evaluate_every: int = execution_key(
        0, ge=0, description="steps between two evaluations during distillation; 0: none; needed by sweep.search: asha"
    )
    checkpoint_every: int = execution_key(
        50, ge=1, description="steps between two checkpoints; slow steps are saved about once a minute too"
    )
    hold: Literal["auto", "device", "host", "shards"] = execution_key(
        "auto",
        description="where kept samples are held: device (GPU), host memory, or shards on disk; auto: the fastest that fits",
    )
    dc: DCSection = DCSection()
    dsa: DSASection = DSASection()
    dm: DMSection = DMSection()
    idc: IDCSection = IDCSection()
    mtt: MTTSection = MTTSection()
    tesla: TESLASection = TESLASection()
    sre2l: SRe2LSection = SRe2LSection()
    rded: RDEDSection = RDEDSection()
    pca: PCASection = later_key(PCASection(), in_ids=False)
    coreset: CoresetSection = later_key(CoresetSection(), in_ids=False)
    options: dict[str, Any] = Field({}, description="options of your own method (package.module:Object)")

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


class RuntimeSection(Section):
    """Runtime pruning: which samples of a real batch are dropped during distillation."""

    rule: Literal["none", "loss", "ite"] = Field(
        "none",
        description="loss: drop the largest losses (dm: both tails of the distance to the real mean); ite: drop extreme "
        "individual treatment effects; dm gains no accuracy from a rule: a smaller real_batch is as good",
    )
    drop: float = Field(0.3, ge=0, lt=1, description="share of each class's real batch to drop")
    tail: float = Field(
        0.5, ge=0, le=1, description="share of the dropped samples with the largest values (ite; dm: loss too)"
    )
    probes: int = Field(16, ge=1, le=1024, description="directions in which a sample's effect is measured (ite)")
    decay: float = Field(0.9, ge=0, lt=1, description="decay of the running variance behind the thresholds (ite)")
    refresh: int = Field(10, ge=1, description="steps between full measurements; cached values decide in between")


class EvaluateSection(Section):
    """Networks trained on the synthetic set and its controls, and tested on real samples."""

    networks: list[str] = Field(["convnet"], min_length=1, description="networks to train and test")
    seeds: int = Field(5, ge=1, description="networks of each kind to train per set")
    epochs: int | None = Field(None, ge=1, description="epochs; null: as the method's protocol says")
    batch: int | None = Field(None, ge=1, description="batch size; null: as the method's protocol says")
    lr: float | None = Field(None, gt=0, le=MAX_LR, description="learning rate; null: as the method's protocol says")
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum; null: as the method's protocol says")
    weight_decay: float | None = Field(None, ge=0, description="weight decay; null: as the method's protocol says")
    control: Literal["random_real", "none"] = later_key(
        "random_real", description="random_real: also train on as many random real samples"
    )
    controls: list[Literal["unpruned", "random_keep"]] = later_key(
        [],
        description="also repeat the distillation: unpruned: from all samples, without runtime pruning; random_keep: "
        "from as many samples per class, kept at random",
    )
    bounds: list[Literal["kept", "full"]] = Field(
        [], description="upper bounds: also train on the kept samples, on the full split"
    )
    bound_epochs: int = Field(30, ge=1, description="epochs of the upper bounds")
    bound_infobatch: float = later_key(
        0.0,
        in_ids=False,
        ge=0,
        lt=1,
        description="bounds: probability to leave a sample of below-mean loss out of an epoch (InfoBatch); 0: off",
    )
    split: Literal["test", "held_out"] = later_key(
        "test",
        in_ids=False,
        description="samples to test on: the test split, or the training samples that select.held_out keeps out",
    )
    precision: Literal["auto", "fp32", "bf16"] = later_key(
        "auto",
        earlier="fp32",
        description="precision of training and testing networks; auto: bf16 on GPUs and on CPUs with "
        "bf16 units, else fp32",
    )

    @field_validator("networks", "controls", "bounds")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("each may be named once")
        return value
