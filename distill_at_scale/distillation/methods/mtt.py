"""MTT, matching training trajectories (Cazenavette et al. 2022, arXiv 2203.11932; METHOD.md section 4).

Experts are trained on the kept samples beforehand (`distillation/methods/shared/experts.py`). Every step puts a student where an expert was after
some epoch, lets it take `student_steps` steps on the synthetic images, and moves these, and the student's learning rate,
so that it ends nearer to where the expert was `target_epochs` later (`distillation/methods/shared/unroll.py`).

Several workers follow a trajectory each and average their gradients by one flat all-reduce: a step is then a batch of as
many trajectories, so results differ from those of one worker as they do for any batch size; each worker holds all images.
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
from distill_at_scale.distillation.methods.shared.experts import (
    ExpertFiles,
    ExpertTraining,
    expert_name,
    expert_options,
    refuse_batch_norm,
)
from distill_at_scale.distillation.methods.shared.unroll import (
    FlatNetwork,
    LossAndGradients,
    StudentStep,
    SyntheticData,
    TrajectorySegment,
    unrolled,
)
from distill_at_scale.distillation.student import TrainingProtocol


class MTT(ImageMethod):
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
        return [expert_name(number) for number in range(cls.section(config).experts)]

    @classmethod
    def network_options(cls, config: Config) -> dict[str, Any]:
        return expert_options(config, cls.section(config))

    @classmethod
    def make_network(cls, name: str, context: MethodContext, real: ClassSampler) -> None:
        section = cls.section(context.config)
        number = cls.networks(context.config).index(name)
        ExpertTraining(number, context, section, real).run(context.networks / name)

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        section = cls.section(config)
        passes = section.experts * section.expert_epochs
        return [Cost(f"train {section.experts} experts", config.distill.network, "kept", passes, True)]

    def __init__(self, context: MethodContext) -> None:
        self.options = self.section(context.config)
        super().__init__(context, self.options.init, self.options.image_lr, self.options.image_momentum)
        self.augmentation = Augmentation(self.options.augment)
        network = context.spec.build(0)
        refuse_batch_norm(context.spec.name, network)
        self.student = FlatNetwork(network.to(context.device), context.spec.at_once(context.device))
        count, epochs = self.options.experts, self.options.expert_epochs
        self.experts = ExpertFiles(context.networks, count, epochs, sum(self.student.sizes), context.device)

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        self.rate = torch.tensor(self.options.student_lr, device=self.context.device, requires_grad=True)
        self.hard = torch.tensor(self.context.labels, device=self.context.device).repeat_interleave(self.ipc)
        groups = [{"params": [tensor], "lr": lr} for tensor, lr in self._learned()]
        self.optimizer = torch.optim.SGD(groups, momentum=self.options.image_momentum)

    def _learned(self) -> list[tuple[Tensor, float]]:
        """Learned tensors, in the order of the gradients of `match`, the rate last, and how fast they are learned."""
        return [(self.images, self.options.image_lr), (self.rate, self.options.student_lr_rate)]

    def synthetic(self) -> SyntheticData:
        return SyntheticData(self.images.detach().flatten(0, 1).requires_grad_(True), self.hard)

    def match(self, task: TrajectorySegment, synthetic: SyntheticData) -> LossAndGradients:
        return unrolled(self.student, task, synthetic, self.rate)

    def trajectory(self, i: int, rank: int) -> TrajectorySegment:
        """What the worker `rank` follows in step i: an expert, its epoch, and the student's batches and augmentation."""
        chance = generator(self.context.seed, "trajectory", i, rank)
        expert = int(torch.randint(self.options.experts, (1,), generator=chance))
        epoch = int(torch.randint(self.options.max_start + 1, (1,), generator=chance))
        start, target = self.experts.parameters(expert, epoch, epoch + self.options.target_epochs)
        return TrajectorySegment(start, target, self._moves(chance))

    def _moves(self, chance: torch.Generator) -> list[StudentStep]:
        """Batches of shuffled images, shuffled anew when all were seen; augmentation has parameters per image."""
        moves: list[StudentStep] = []
        waiting: list[Tensor] = []
        for _ in range(self.options.student_steps):
            if not waiting:
                size = self.options.student_batch or len(self.hard)
                waiting = list(torch.randperm(len(self.hard), generator=chance).split(size))
            rows = waiting.pop(0)
            moves.append(StudentStep(rows, self.augmentation.draw(chance, per_image=len(rows))))
        return moves

    def step(self, i: int) -> dict[str, float]:
        workers = self.context.workers
        loss, gradients = self.match(self.trajectory(i, workers.rank), self.synthetic())
        shared = [loss.clone(), *gradients]
        workers.all_reduce_sum(shared)
        loss, *gradients = [tensor / workers.size for tensor in shared]
        rate = float(self.rate.detach())
        self._advance(i, loss, gradients)
        return {"loss": float(loss), "student_lr": rate}

    def _advance(self, step: int, loss: Tensor, gradients: list[Tensor]) -> None:
        """Step everything that is learned; all stays as it was where something would not be finite.

        All workers have the same numbers here, so they go on or stop together.
        """
        tensors = [tensor for tensor, _ in self._learned()]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient.view_as(tensor)
        what = self._broken([tensor.grad for tensor in tensors], "the gradient", loss)
        if what is None:
            before = [(tensor.detach().clone(), self._buffer(tensor)) for tensor in tensors]
            self.optimizer.step()
            what = self._broken([tensor.detach() for tensor in tensors], "an update", loss)
            if what is None and float(self.rate.detach()) <= 0:
                what = f"the learned student rate would become {float(self.rate.detach()):g}"
            if what is not None:
                self._restore(tensors, before)
        if what is not None:
            raise DistillationDiverged(self._message(what, step))

    def _broken(self, tensors: list[Any], what: str, loss: Tensor) -> str | None:
        """In words, what is not finite: the loss, or of the tensors the first, with its class where it has one."""
        if not bool(torch.isfinite(loss)):
            return "the distance of the student from the expert is not finite"
        for tensor, (learned, _) in zip(tensors, self._learned(), strict=True):
            fine = torch.isfinite(tensor)
            if not bool(fine.all()) and learned is self.rate:
                return f"{what} of the student rate is not finite"
            if not bool(fine.all()):
                place = int((~fine.flatten(1).all(1)).nonzero()[0])
                return f"{what} of class {self.context.class_names[self.context.labels[place]]!r} is not finite"
        return None

    def _message(self, what: str, step: int) -> str:
        section = f"distill.{self.context.config.distill.method}"
        return (
            f"{what} at step {step}, image learning rate {self.lr:g}, student learning rate {float(self.rate.detach()):g} "
            f"(learned at {self.options.student_lr_rate:g}); lower {section}.image_lr or {section}.student_lr_rate. "
            "The last good state is kept."
        )

    def _buffer(self, tensor: Tensor) -> Tensor | None:
        buffer = self.optimizer.state.get(tensor, {}).get("momentum_buffer")
        return None if buffer is None else buffer.clone()

    def _restore(self, tensors: list[Tensor], before: list[tuple[Tensor, Tensor | None]]) -> None:
        with torch.no_grad():
            for tensor, (value, buffer) in zip(tensors, before, strict=True):
                tensor.copy_(value)
                self.optimizer.state[tensor]["momentum_buffer"] = buffer

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        rate = self.rate.detach().cpu()
        card = {"student_lr": {"start": self.options.student_lr, "learned": float(rate),
                               "meaning": "learned with the images; it is the protocol's lr"}}  # fmt: skip
        return FinalOutputs({"student_lr": rate.reshape(1)}, {"lr": float(rate)}, card)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"rate": self.rate.detach().cpu().reshape(1)}
        buffer = self._buffer(self.rate)
        return state if buffer is None else state | {"rate momentum": buffer.cpu().reshape(1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.rate.copy_(state["rate"].squeeze())
        if "rate momentum" in state:
            self.optimizer.state[self.rate]["momentum_buffer"] = state["rate momentum"].to(self.rate.device).squeeze()
