"""MTT, matching training trajectories (Cazenavette et al. 2022, arXiv 2203.11932; see `distillation/README.md`).

Experts are in `shared/experts.py`, the student's steps in `shared/unroll.py`. With several workers each holds all images
and follows its own trajectory: a step is a batch of `workers.size` trajectories.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import MTTSection
from distill_at_scale.core.errors import DistillationDiverged
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.base import ImageMethod
from distill_at_scale.distillation.methods.contract import Cost, FinalOutputs, MethodContext
from distill_at_scale.distillation.methods.shared import experts, unroll
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.pruning.infobatch import expected_share


class MTT(ImageMethod):
    parallel: ClassVar[str] = "replicate"
    default_steps: ClassVar[int] = 5000
    no_runtime: ClassVar[str] = "trajectory matching has no real batch in its steps from which samples could be dropped"
    section_name: ClassVar[str] = "mtt"
    options: MTTSection

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        """`finalize` replaces the learning rate by the learned one."""
        return TrainingProtocol(1000, cls.section(config).augment)

    @classmethod
    def networks(cls, config: Config) -> list[str]:
        return [experts.expert_name(number) for number in range(cls.section(config).experts)]

    @classmethod
    def network_options(cls, config: Config) -> dict[str, Any]:
        """Keys do not name the method, so that methods share experts."""
        own = {key: value for key, value in result_values(cls.section(config)).items() if key.startswith("expert_")}
        return {f"distill.{key}": getattr(config.distill, key) for key in ("network", "width", "depth")} | own

    @classmethod
    def network_epochs(cls, config: Config) -> int:
        return cls.section(config).expert_epochs

    @classmethod
    def make_network(cls, name: str, context: MethodContext, real: ClassSampler) -> None:
        number = cls.networks(context.config).index(name)
        experts.ExpertTraining(number, context, cls.section(context.config), real).run(context.networks / name)

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        section = cls.section(config)
        share = expected_share(section.expert_infobatch, section.expert_epochs)
        passes = section.experts * section.expert_epochs * share
        return [Cost(f"train {section.experts} experts", config.distill.network, "kept", passes, True)]

    def __init__(self, context: MethodContext) -> None:
        options = self.options = self.section(context.config)
        super().__init__(context, options.init, options.image_lr, options.image_momentum)
        self.augmentation = Augmentation(options.augment)
        net = context.spec.build(0)
        experts.refuse_batch_norm(context.spec.name, net)
        self.student = unroll.FlatNetwork(net.to(context.device), context.spec.microbatch(context.device))
        size = sum(self.student.sizes)
        self.experts = experts.ExpertFiles(context.networks, options.expert_epochs, size, context.device)

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        self.student_lr = torch.tensor(self.options.student_lr, device=self.context.device, requires_grad=True)
        self.labels = torch.tensor(self.context.labels, device=self.context.device).repeat_interleave(self.ipc)
        self.optimizer = torch.optim.SGD([self.images], self.lr, self.momentum)
        self.optimizer.add_param_group({"params": [self.student_lr], "lr": self.options.student_lr_rate})

    def learned(self) -> dict[str, Tensor]:
        """In the order of the gradients of `match`."""
        return {"images": self.images, "rate": self.student_lr}

    def step(self, i: int) -> dict[str, float]:
        """Algorithm 1 of the paper for one trajectory per worker: |theta_T - target|^2 / |theta_0 - target|^2."""
        workers = self.context.workers
        loss, gradients = self.match(self.segment(i, workers.rank), self.synthetic())
        shared = [loss.clone(), *gradients]
        workers.all_reduce_sum(shared)
        loss, *gradients = [tensor / workers.size for tensor in shared]
        student_lr = float(self.student_lr.detach())
        self._update_learned(i, loss, gradients)
        return {"loss": float(loss), "student_lr": student_lr}

    def segment(self, i: int, rank: int) -> unroll.TrajectorySegment:
        """What worker `rank` follows in step i: an expert's epochs, and the student's batches and augmentation."""
        options, rng = self.options, generator(self.context.seed, "trajectory", i, rank)
        expert = int(torch.randint(options.experts, (1,), generator=rng))
        epoch = int(torch.randint(options.max_start + 1, (1,), generator=rng))
        start, target = self.experts.parameters(expert, epoch, epoch + options.target_epochs)
        steps, batches = list[unroll.StudentStep](), list[Tensor]()
        for _ in range(options.student_steps):
            if not batches:  # all images were used: shuffle again
                size = options.student_batch or len(self.labels)
                batches = list(torch.randperm(len(self.labels), generator=rng).split(size))
            rows = batches.pop(0)
            steps.append(unroll.StudentStep(rows, self.augmentation.draw(rng, per_image=len(rows))))
        return unroll.TrajectorySegment(start, target, steps)

    def synthetic(self) -> unroll.SyntheticData:
        return unroll.SyntheticData(self.images.detach().flatten(0, 1).requires_grad_(True), self.labels)

    def match(self, segment: unroll.TrajectorySegment, synthetic: unroll.SyntheticData) -> unroll.LossAndGradients:
        """The loss, and its gradients in the learned tensors."""
        return unroll.unrolled(self.student, segment, synthetic, self.student_lr)

    def _update_learned(self, step: int, loss: Tensor, gradients: list[Tensor]) -> None:
        """Move all learned tensors, or none if a value is not finite; workers have equal values and stop together."""
        for tensor, gradient in zip(self.learned().values(), gradients, strict=True):
            tensor.grad = gradient.view_as(tensor)

        def problem_of_update() -> str | None:
            rate = float(self.student_lr.detach())
            problem = self._not_finite({name: tensor.detach() for name, tensor in self.learned().items()}, "an update")
            return problem or (f"the learned student rate would become {rate:g}" if rate <= 0 else None)

        if bool(torch.isfinite(loss)):
            problem = self._not_finite({name: tensor.grad for name, tensor in self.learned().items()}, "the gradient")
        else:
            problem = "the distance of the student from the expert is not finite"
        problem = problem or self.step_or_undo(problem_of_update)
        if problem is not None:
            section = f"distill.{self.context.config.distill.method}"
            raise DistillationDiverged(
                f"{problem} at step {step}, image learning rate {self.lr:g}, student learning rate "
                f"{float(self.student_lr.detach()):g} (learned at {self.options.student_lr_rate:g}); lower "
                f"{section}.image_lr or {section}.student_lr_rate. The last good state is kept."
            )

    def _not_finite(self, tensors: dict[str, Any], what: str) -> str | None:
        """The first of the learned tensors, or of their gradients, that is not finite, in words."""
        for name, tensor in tensors.items():
            finite = torch.isfinite(tensor)
            if bool(finite.all()):
                continue
            if name == "rate":
                return f"{what} of the student rate is not finite"
            index = int((~finite.flatten(1).all(1)).nonzero()[0])
            return f"{what} of class {self.context.class_names[self.context.labels[index]]!r} is not finite"
        return None

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        lr = self.student_lr.detach().cpu()
        card = {"student_lr": {"start": self.options.student_lr, "learned": float(lr),
                               "meaning": "learned with the images; it is the protocol's lr"}}  # fmt: skip
        return FinalOutputs({"student_lr": lr.reshape(1)}, {"lr": float(lr)}, card)
