"""The base class of methods that optimise images with SGD. `contract.py` says what the loop calls, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler, RealBatch
from distill_at_scale.distillation.augment import AugmentParams, apply_each
from distill_at_scale.distillation.methods.contract import Cost, FinalOutputs, Judge, Method, MethodContext
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.pruning.runtime import RuntimePruning

__all__ = ["Cost", "FinalOutputs", "ImageMethod", "Judge", "Method", "MethodContext"]  # all that a method needs

USUAL_WORKERS = 2  # that each compile, in the estimate whether compiling pays
OVERFLOW_MARGIN = 1e30  # well below the largest float32
# of an optimiser's state: torch's names, and those in checkpoints
OPTIMIZER_KEYS = {"momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "adam_steps"}

Problem = TypeVar("Problem")


class ImageMethod(Method):
    """Base class of methods that learn images, by SGD with momentum unless `prepare` sets another `optimizer`.

    A subclass sets `default_steps`, `init_of` and `protocol`, and writes `step`: compute `self.images.grad`, call
    `update` once or more, then `raise_if_diverged`. It inherits initialisation, divergence checks, checkpoints and the
    division of the classes among workers. If it learns more tensors it extends `learned`.

    Attributes:
        context: see `MethodContext`.
        ipc: images per class, `distill.ipc`.
        lr: learning rate of the images.
        images: the synthetic images [own classes, ipc, *shape], normalised, on the device, in the order of
            `context.labels`; a leaf that requires a gradient. Set by `prepare`.
        optimizer: their optimiser. Set by `prepare`.
        real: draws of kept real samples of the own classes. Set by `prepare`.
        pruning: the runtime pruning of real batches (`runtime.*`); its memory is part of the state.
    """

    def __init__(self, context: MethodContext, init: str, lr: float, momentum: float) -> None:
        """`init` is "noise" (standard normal) or "real" (distinct kept samples); `lr` and `momentum` are the images'."""
        self.context, self.init, self.lr, self.momentum = context, init, lr, momentum
        self.ipc, self.pruning = context.config.distill.ipc, RuntimePruning(context.config.runtime, self.both_tails)
        self.divergence: DistillationDiverged | None = None
        self.updates = 0  # within the current step

    @classmethod
    def init_of(cls, config: Config) -> str:
        return cls.section(config).init

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        augment = cls.section(config).augment
        return TrainingProtocol(300 if augment == "none" else 1000, augment)

    def prepare(self, real: ClassSampler) -> None:
        self.real = real
        images = torch.stack([self._initial_images(label) for label in self.context.labels])
        self.images = images.to(self.context.device).requires_grad_(True)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD([self.images], lr=self.lr, momentum=self.momentum)

    def learned(self) -> dict[str, Tensor]:
        """The learned tensors by name: scalars, or [own classes, ...]. With their optimiser's state they are the state."""
        return {"images": self.images}

    def _initial_images(self, label: int) -> Tensor:
        if self.init == "noise":
            noise = generator(self.context.seed, "noise", label)
            return torch.randn(self.ipc, *self.context.spec.shape, generator=noise)
        if self.real.count(label) < self.ipc:
            raise UserError(too_few_message(self.context.class_names[label], self.real.count(label), self.ipc))
        return self.real_images(label).cpu()

    def real_images(self, label: int) -> Tensor:
        """The images that a class starts from with `init: real` [ipc, *shape]."""
        return self.real.draw([label], self.ipc, "initial images")[0].images

    def augmented_batches(
        self, batches: Sequence[RealBatch], params: Sequence[AugmentParams], update: int
    ) -> tuple[list[Tensor], list[int]]:
        """Augment the real batches (one per class), without samples that runtime pruning drops by the values it remembers.

        `update` counts the updates over all steps; every `runtime.refresh` updates all samples are rated again. Returns the
        images [n, *shape] of each batch, and the indices of batches that are whole and to be rated by `kept_mask`.
        """
        masks = [self.pruning.remembered_mask(b.label, b.rows, self.real.count(b.label), update) for b in batches]
        counts = [len(b.rows) if mask is None else int(mask.sum()) for b, mask in zip(batches, masks, strict=True)]
        images = torch.cat([b.images for b in batches])
        if any(mask is not None for mask in masks):
            kept = [torch.ones(len(b.rows)) if m is None else m for b, m in zip(batches, masks, strict=True)]
            images = images[torch.cat(kept).nonzero()[:, 0].to(images.device, non_blocking=True)]
        together = list(apply_each(params, images, counts).split(counts))
        return together, [k for k, b in enumerate(batches) if masks[k] is None and self.pruning.drop_count(len(b.rows))]

    def kept_mask(self, batch: RealBatch, loss: Callable[[], Tensor], ite: Callable[[], Tensor]) -> Tensor:
        """Rate a whole batch by `runtime.rule`; True for the samples that are kept [n].

        `loss` and `ite` compute what these rules judge by [n]; only that of the configured rule is called.
        """
        values = self.pruning.values(loss=loss, ite=ite)
        return self.pruning.observe(batch.label, batch.rows, self.real.count(batch.label), values)

    def update(self, losses: Sequence[Tensor], step: int) -> list[float]:
        """Move the images along `self.images.grad`, unless something is not finite.

        `losses` are one scalar per own class. A failure is only recorded, and the images stay as they are until
        `raise_if_diverged`: workers that train a network together must all reach the end of the step. Returns the losses as
        numbers; a GPU is waited for once.
        """
        self.updates += 1
        classes = len(losses)
        values, images = torch.stack(list(losses)).detach(), self.images.detach()
        tensors = [images, self.images.grad, *self.optimizer.state.get(self.images, {}).values()]
        extremes = torch.stack([x for t in tensors if t is not None for x in t.aminmax()]).abs()
        # read from the device at one time, since each reading waits for it
        numbers = torch.cat([values, _finite(values, self.images.grad).to(values.dtype), extremes]).tolist()
        numbers, finite, largest = numbers[:classes], numbers[classes : 2 * classes], numbers[2 * classes :]
        if self.divergence is not None:
            return numbers
        bad = None if all(finite) else finite.index(0)
        if bad is None:
            # without copies if no overflow is possible: they take as much memory as the set
            if sum(largest) * max(1.0, self.lr) < OVERFLOW_MARGIN:
                self.optimizer.step()
            else:
                bad = self.step_or_undo(lambda: _first_not_finite(images.flatten(1).sum(1), images))
        if bad is not None:
            section, name = self.context.config.distill, self.context.class_names[self.context.labels[bad]]
            trains_network = hasattr(getattr(section, section.method, None), "network_lr")
            keys = ("image_lr", "network_lr") if trains_network else ("image_lr",)
            rates = " or ".join(f"distill.{section.method}.{key}" for key in keys)
            self.divergence = DistillationDiverged(
                f"the loss or gradient of class {name!r} is not finite at step {step}, image learning rate {self.lr:g}; "
                f"lower {rates}. The last good state is kept.",
                self.updates,
            )
        return numbers

    def raise_if_diverged(self) -> None:
        """End a step: raises DistillationDiverged if one of its updates failed."""
        divergence, self.divergence, self.updates = self.divergence, None, 0
        if divergence is not None:
            raise divergence

    def step_or_undo(self, find_problem: Callable[[], Problem | None]) -> Problem | None:
        """One step of the optimiser, undone if there is a problem afterwards; returns the problem."""
        before = [(t, t.detach().clone(), deepcopy(self.optimizer.state.get(t, {}))) for t in self.learned().values()]
        self.optimizer.step()
        problem = find_problem()
        if problem is not None:
            with torch.no_grad():
                for tensor, values, state in before:
                    tensor.copy_(values)
                    self.optimizer.state[tensor] = state
        return problem

    def snapshot(self) -> tuple[Tensor, Tensor]:
        return self.images.detach().flatten(0, 1).cpu(), torch.tensor(self.context.labels).repeat_interleave(self.ipc)

    def state_dict(self) -> dict[str, Tensor]:
        state = self.pruning.state_dict()
        for name, tensor in self.learned().items():
            optimizer = self.optimizer.state.get(tensor, {})
            moments = {_state_key(name, k): v for k, v in optimizer.items() if v is not None}
            for key, values in ({name: tensor.detach()} | moments).items():
                if values.dim():
                    state |= {f"{key}/{c}": values[k].cpu() for k, c in enumerate(self.context.labels)}
                else:
                    state[key] = values.cpu()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        labels = self.context.labels

        def saved(key: str) -> Tensor | None:
            if key in state:
                return state[key].reshape(()).clone()
            return torch.stack([state[f"{key}/{c}"] for c in labels]) if f"{key}/{labels[0]}" in state else None

        for name, tensor in self.learned().items():
            values = saved(name)
            assert values is not None, f"the state lacks {name}"
            with torch.no_grad():
                tensor.copy_(values)
            for key in OPTIMIZER_KEYS:
                if (values := saved(_state_key(name, key))) is not None:
                    # Adam's step counter stays on the CPU
                    self.optimizer.state[tensor][key] = values if key == "step" else values.to(tensor.device)
        self.pruning.load_state_dict(state, labels)


def _state_key(name: str, key: str) -> str:
    """The name in checkpoints of an entry of the optimiser's state for the learned tensor `name`."""
    return OPTIMIZER_KEYS[key] if name == "images" else f"{name} {OPTIMIZER_KEYS[key]}"


def _first_not_finite(values: Tensor, images: Tensor | None) -> int | None:
    """The first class whose value [classes] or whose part of `images` [classes, ...] is not finite."""
    finite = _finite(values, images).tolist()
    return None if all(finite) else finite.index(False)


def _finite(values: Tensor, images: Tensor | None) -> Tensor:
    """Whether the value and the part of `images` are finite, per class; bool [classes]."""
    finite = torch.isfinite(values)
    if images is not None:  # the extremes suffice and need no mask of the size of the images
        finite = finite & torch.isfinite(torch.stack(images.flatten(1).aminmax(dim=1))).all(0)
    return finite


def too_few_message(name: str, kept: int, ipc: int) -> str:
    return (
        f"the class {name!r} has {kept} samples, fewer than distill.ipc = {ipc}, but images start from distinct real "
        "samples; lower distill.ipc or set init: noise in the method's section"
    )
