"""MTT, matching training trajectories (Cazenavette et al. 2022, arXiv 2203.11932).

Experts are trained on the kept samples beforehand (`shared/experts.py`). Each step starts a student at the parameters of an
expert after some epoch, takes `student_steps` SGD steps on the synthetic images (`shared/unroll.py`), and moves the images
and the student's learning rate so that it ends closer to the expert `target_epochs` later.

With several workers each holds all images and follows its own trajectory, and gradients are averaged in one flat
all-reduce: a step is a batch of `workers.size` trajectories, and results depend on that number as on any batch size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import MTTSection
from distill_at_scale.core.errors import DistillationDiverged
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.base import Cost, FinalOutputs, ImageMethod, MethodContext
from distill_at_scale.distillation.methods.shared import experts, unroll
from distill_at_scale.distillation.student import TrainingProtocol


class MTT(ImageMethod):
    """A subclass may learn more tensors (`_learned`) or compute the gradients in another way (`match`)."""

    parallel: ClassVar[str] = "replicate"
    default_steps: ClassVar[int] = 5000
    no_runtime: ClassVar[str] = "trajectory matching has no real batch in its steps from which samples could be dropped"

    @staticmethod
    def section(config: Config) -> MTTSection:
        return config.distill.mtt

    @classmethod
    def init_of(cls, config: Config) -> str:
        return cls.section(config).init

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        """`finalize` replaces the learning rate by the learned one."""
        return TrainingProtocol(1000, cls.section(config).augment)

    @classmethod
    def networks(cls, config: Config) -> list[str]:
        return [experts.expert_name(number) for number in range(cls.section(config).experts)]

    @classmethod
    def network_options(cls, config: Config) -> dict[str, Any]:
        return experts.expert_options(config, cls.section(config))

    @classmethod
    def make_network(cls, name: str, context: MethodContext, real: ClassSampler) -> None:
        number = cls.networks(context.config).index(name)
        experts.ExpertTraining(number, context, cls.section(context.config), real).run(context.networks / name)

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        section = cls.section(config)
        passes = section.experts * section.expert_epochs
        return [Cost(f"train {section.experts} experts", config.distill.network, "kept", passes, True)]

    def __init__(self, context: MethodContext) -> None:
        options = self.options = self.section(context.config)
        super().__init__(context, options.init, options.image_lr, options.image_momentum)
        self.augmentation = Augmentation(options.augment)
        net = context.spec.build(0)
        experts.refuse_batch_norm(context.spec.name, net)
        self.student = unroll.FlatNetwork(net.to(context.device), context.spec.microbatch(context.device))
        size = sum(self.student.sizes)
        self.experts = experts.ExpertFiles(
            context.networks, options.experts, options.expert_epochs, size, context.device
        )

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        self.student_lr = torch.tensor(self.options.student_lr, device=self.context.device, requires_grad=True)
        self.labels = torch.tensor(self.context.labels, device=self.context.device).repeat_interleave(self.ipc)
        groups = [{"params": [tensor], "lr": lr} for tensor, lr in self._learned()]
        self.optimizer = torch.optim.SGD(groups, momentum=self.options.image_momentum)

    def _learned(self) -> list[tuple[Tensor, float]]:
        """The learned tensors and their learning rates, in the order of the gradients of `match`; student_lr comes last."""
        return [(self.images, self.options.image_lr), (self.student_lr, self.options.student_lr_rate)]

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
        steps: list[unroll.StudentStep] = []
        batches: list[Tensor] = []
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
        """Move all learned tensors, or none of them if something would not be finite.

        All workers have the same numbers here, so they go on or stop together.
        """
        tensors = [tensor for tensor, _ in self._learned()]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient.view_as(tensor)
        problem = self._not_finite([tensor.grad for tensor in tensors], "the gradient", loss)
        if problem is None:
            before = [(tensor.detach().clone(), self._buffer(tensor)) for tensor in tensors]
            self.optimizer.step()
            problem = self._not_finite([tensor.detach() for tensor in tensors], "an update", loss)
            if problem is None and float(self.student_lr.detach()) <= 0:
                problem = f"the learned student rate would become {float(self.student_lr.detach()):g}"
            if problem is not None:
                with torch.no_grad():
                    for tensor, (value, buffer) in zip(tensors, before, strict=True):
                        tensor.copy_(value)
                        self.optimizer.state[tensor]["momentum_buffer"] = buffer
        if problem is not None:
            section = f"distill.{self.context.config.distill.method}"
            raise DistillationDiverged(
                f"{problem} at step {step}, image learning rate {self.lr:g}, student learning rate "
                f"{float(self.student_lr.detach()):g} (learned at {self.options.student_lr_rate:g}); lower "
                f"{section}.image_lr or {section}.student_lr_rate. The last good state is kept."
            )

    def _not_finite(self, tensors: list[Any], what: str, loss: Tensor) -> str | None:
        """What is not finite, in words: the loss, or the first of the tensors, with its class if it has one."""
        if not bool(torch.isfinite(loss)):
            return "the distance of the student from the expert is not finite"
        for tensor, (learned, _) in zip(tensors, self._learned(), strict=True):
            finite = torch.isfinite(tensor)
            if not bool(finite.all()) and learned is self.student_lr:
                return f"{what} of the student rate is not finite"
            if not bool(finite.all()):
                index = int((~finite.flatten(1).all(1)).nonzero()[0])
                return f"{what} of class {self.context.class_names[self.context.labels[index]]!r} is not finite"
        return None

    def _buffer(self, tensor: Tensor) -> Tensor | None:
        buffer = self.optimizer.state.get(tensor, {}).get("momentum_buffer")
        return None if buffer is None else buffer.clone()

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        lr = self.student_lr.detach().cpu()
        card = {"student_lr": {"start": self.options.student_lr, "learned": float(lr),
                               "meaning": "learned with the images; it is the protocol's lr"}}  # fmt: skip
        return FinalOutputs({"student_lr": lr.reshape(1)}, {"lr": float(lr)}, card)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"rate": self.student_lr.detach().cpu().reshape(1)}
        buffer = self._buffer(self.student_lr)
        return state if buffer is None else state | {"rate momentum": buffer.cpu().reshape(1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.student_lr.copy_(state["rate"].squeeze())
        if "rate momentum" in state:
            buffer = state["rate momentum"].to(self.student_lr.device).squeeze()
            self.optimizer.state[self.student_lr]["momentum_buffer"] = buffer
