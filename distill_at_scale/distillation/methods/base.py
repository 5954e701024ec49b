"""The contract of a distillation method, and what the methods share: the synthetic images of a worker's own classes.

Where a method needs networks of its own (experts, a teacher) it names them in `networks`; each is made by
`make_network`, in a task of its own, before anything else. The loop in `distillation/engine.py` calls `prepare` once, then `step(i)`
for every outer update, and `finish` for the images as they are; `finalize` comes once, after the last step. In between it
may save `state_dict` and, in another process, `load_state_dict` it. A step draws all its randomness from (seed,
purpose, i), so nothing else has to be saved. Keys of a state are `what/label` where they belong to a class, so that a
state moves between any numbers of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import Collectives
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pruning.runtime import RuntimePruning

FAR = 1e30  # well below the largest 32-bit float


@dataclass(frozen=True)
class MethodContext:
    """Everything a backend may know about its surroundings."""

    config: Config
    spec: NetworkSpec
    class_names: list[str]
    labels: list[int]  # the classes that this worker owns, ascending
    workers: Collectives
    device: torch.device
    steps: int
    networks: Path = Path()  # the folder of what `make_network` made
    source_class_names: tuple[str, ...] = ()  # every class of the source, also where only some are distilled

    @property
    def seed(self) -> int:
        return self.config.distill_seed


class Method(Protocol):
    parallel: ClassVar[str]  # "classes": each worker owns some; "replicate": each worker holds all
    default_steps: ClassVar[int]
    no_runtime: ClassVar[str]  # why runtime pruning does not apply; "" where it does
    batch_norm: ClassVar[str]  # of distill.network: "refused" or "any"
    ranks_patches: ClassVar[
        bool
    ]  # whether patches of real images are ranked by the scoring actors before the first step

    def __init__(self, context: MethodContext) -> None: ...

    @staticmethod
    def init_of(config: Config) -> str:
        """Where the images start: "noise" or "real" (then a class needs as many kept samples as it gets images)."""

    @staticmethod
    def protocol(config: Config) -> TrainingProtocol:
        """The training that the set expects; goes into the card."""

    @staticmethod
    def networks(config: Config) -> list[str]:
        """Names of the networks to be made before the first step; mostly none."""

    @staticmethod
    def network_options(config: Config) -> dict[str, Any]:
        """The configuration values that decide what these networks are; they are part of the fingerprint."""

    @staticmethod
    def make_network(name: str, context: MethodContext, real: ClassSampler) -> None:
        """Make one of them, from the kept samples of all classes, and publish it as `context.networks / name`."""

    @staticmethod
    def costs(config: Config) -> list[Cost]:
        """Passes through networks beside the steps, for `plan`."""

    def prepare(self, real: ClassSampler) -> None:
        """Called once, with the kept samples of the own classes, when the networks are there."""

    def step(self, i: int) -> dict[str, float]:
        """One outer update; returns what is worth logging.

        Raises DistillationDiverged, before the images are changed, where a loss is not finite.
        """

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """Images float32 [n, *shape] and labels int64 [n] of the own classes as they are now, on the CPU."""

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        """After the last step, on every worker with the whole set: what else belongs to it. Rank 0's answer counts."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class FinalOutputs:
    """Tensors that are saved beside the images (`SyntheticSet.extras`), what has been learned about the training of
    students (`TrainingProtocol` fields), and entries of the card."""

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Work outside the steps: `passes` over every kept sample or every synthetic image, through one network."""

    what: str  # in words, "train 100 experts"
    network: str
    images: Literal["kept", "synthetic"]
    passes: float
    backward: bool  # training; else only forward


class MethodDefaults:
    """What most methods answer to the questions of the contract."""

    parallel: ClassVar[str] = "classes"
    no_runtime: ClassVar[str] = ""
    batch_norm: ClassVar[str] = "refused"
    ranks_patches: ClassVar[bool] = False

    @staticmethod
    def networks(config: Config) -> list[str]:
        return []

    @staticmethod
    def network_options(config: Config) -> dict[str, Any]:
        return {}

    @staticmethod
    def make_network(name: str, context: MethodContext, real: ClassSampler) -> None:
        raise UserError(
            f"the method distill.method = {context.config.distill.method!r} names the network {name!r} and has no "
            "make_network(name, context, real) to make it"
        )

    @staticmethod
    def costs(config: Config) -> list[Cost]:
        return []

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        return FinalOutputs()


class ImageMethod(MethodDefaults):
    """Synthetic images [own classes, ipc, *shape] with their optimiser: SGD with momentum."""

    def __init__(self, context: MethodContext, init: str, lr: float, momentum: float) -> None:
        self.context, self.init, self.lr, self.momentum = context, init, lr, momentum
        self.ipc = context.config.distill.ipc
        self.pruning = RuntimePruning(context.config.runtime)
        self.problem: DistillationDiverged | None = None
        self.visit = 0

    def prepare(self, real: ClassSampler) -> None:
        self.real = real
        images = torch.stack([self._initial(label) for label in self.context.labels])
        self.images = images.to(self.context.device).requires_grad_(True)
        self.optimizer = torch.optim.SGD([self.images], lr=self.lr, momentum=self.momentum)

    def update(self, losses: list[Tensor], step: int) -> None:
        """Step the images along gradients that are already in place; `losses` has one entry per own class.

        Where something is not finite the images stay as they are, for the rest of the step too, and `raise_if_diverged` raises:
        workers that train a network together must all reach the end of the step.
        """
        self.visit += 1
        if self.problem is not None:
            return
        bad = _first_broken(torch.stack([loss.detach() for loss in losses]), self.images.grad)
        if bad is None:
            bad = self._move()
        if bad is not None:
            name = self.context.class_names[self.context.labels[bad]]
            self.problem = DistillationDiverged(
                f"the loss or gradient of class {name!r} is not finite at step {step}, image learning rate {self.lr:g}; "
                f"lower {self._rates()}. The last good state is kept.",
                self.visit,
            )

    def _rates(self) -> str:
        """The keys of whatever may have been too fast."""
        made = self.context.config.distill
        trained = hasattr(getattr(made, made.method, None), "network_lr")
        return f"distill.{made.method}.image_lr" + (f" or distill.{made.method}.network_lr" if trained else "")

    def raise_if_diverged(self) -> None:
        """Raises DistillationDiverged if an update of this step could not be made."""
        problem, self.problem, self.visit = self.problem, None, 0
        if problem is not None:
            raise problem

    def _move(self) -> int | None:
        """One optimiser step; undone, with the place of the class returned, if images overflow.

        Only where they come near that is a copy kept, as it would take as much memory as the set.
        """
        if self._far_from_overflow():
            self.optimizer.step()
            return None
        images, state = self.images.detach().clone(), self._momentum()
        before = None if state is None else state.clone()
        self.optimizer.step()
        bad = _first_broken(self.images.detach().flatten(1).sum(1), self.images.detach())
        if bad is not None:
            with torch.no_grad():
                self.images.copy_(images)
            self.optimizer.state[self.images]["momentum_buffer"] = before
        return bad

    def _far_from_overflow(self) -> bool:
        held = (self.images.detach(), self.images.grad, self._momentum())
        largest = [max(map(abs, map(float, t.aminmax()))) for t in held if t is not None]
        return sum(largest) * max(1.0, self.lr) < FAR

    def _momentum(self) -> Tensor | None:
        return self.optimizer.state.get(self.images, {}).get("momentum_buffer")

    def snapshot(self) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(self.context.labels).repeat_interleave(self.ipc)
        return self.images.detach().flatten(0, 1).cpu(), labels

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"images/{c}": self.images[k].detach().cpu() for k, c in enumerate(self.context.labels)}
        buffer = self._momentum()
        if buffer is not None:
            state |= {f"momentum/{c}": buffer[k].cpu() for k, c in enumerate(self.context.labels)}
        return state | self.pruning.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        labels, device = self.context.labels, self.context.device
        with torch.no_grad():
            self.images.copy_(torch.stack([state[f"images/{c}"] for c in labels]))
        if f"momentum/{labels[0]}" in state:
            buffer = torch.stack([state[f"momentum/{c}"] for c in labels]).to(device)
            self.optimizer.state[self.images]["momentum_buffer"] = buffer
        self.pruning.load_state_dict(state, labels)

    def _initial(self, label: int) -> Tensor:
        if self.init == "noise":
            return torch.randn(
                self.ipc, *self.context.spec.shape, generator=generator(self.context.seed, "noise", label)
            )
        if self.real.count(label) < self.ipc:
            raise UserError(too_few_message(self.context.class_names[label], self.real.count(label), self.ipc))
        return self.real.draw([label], self.ipc, "initial images")[0].images.cpu()


def _first_broken(values: Tensor, images: Tensor | None) -> int | None:
    """The first class whose value or whose part of a tensor [classes, ...] is not finite."""
    fine = torch.isfinite(values)
    if images is not None:  # by their extremes, which need no copy
        fine = fine & torch.isfinite(torch.stack(images.flatten(1).aminmax(dim=1))).all(0)
    return None if bool(fine.all()) else int((~fine).nonzero()[0])


def too_few_message(name: str, held: int, ipc: int) -> str:
    return (
        f"the class {name!r} has {held} samples, fewer than distill.ipc = {ipc} images to be initialised from real ones; "
        "lower distill.ipc or start from noise (init: noise in the method's section)"
    )
