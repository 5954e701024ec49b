"""The contract of a distillation method, and the base class of methods that optimise images with SGD.

Order of calls, in every worker: `__init__`, `prepare`, perhaps `load_state_dict`, then `step(i)` for i = 0, 1, ..., with
`snapshot` and `state_dict` between steps, and `finalize` once at the end. `make_network` runs before all that, in a task
of its own per network. A step draws its randomness from (seed, purpose, i) alone, so a state holds no random generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import Collectives
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Progressed
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler, RealBatch
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.augment import AugmentParams, apply_each
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pruning.runtime import RuntimePruning

USUAL_WORKERS = 2  # that each compile, in the estimate whether compiling pays
OVERFLOW_MARGIN = 1e30  # well below the largest float32
# of an optimiser's state: torch's names, and those in checkpoints
OPTIMIZER_KEYS = {"momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "adam_steps"}

Problem = TypeVar("Problem")
# a label and samples of its class, normalised, in parts [n, *shape] on the device -> a value of each; low ones are typical
Judge = Callable[[int, Iterable[Tensor]], Tensor]


@dataclass(frozen=True)
class MethodContext:
    """What a method knows about the run and about the worker that it runs in.

    Attributes:
        config: the whole configuration. A method of your own finds its settings in `config.distill.options`.
        spec: the network `distill.network`; `spec.shape` is a sample's shape, `spec.build(seed)` a new network on the CPU.
        class_names: names of all classes that are distilled; a label is an index into them.
        labels: the classes that this worker owns, ascending. All of them if `parallel` is "replicate", else every
            `workers.size`-th, starting at `workers.rank`.
        workers: collectives between the workers: `rank`, `size`, `all_reduce_sum`, ...
        device: where the worker computes.
        steps: how many steps the run has in total.
        networks: the folder with the files that `make_network` wrote; for a method that needs none it is not there.
        source_class_names: all classes of the source, also if only some of them are distilled.
        progressed: to call in `make_network` with the samples seen so far, over all epochs.
    """

    config: Config
    spec: NetworkSpec
    class_names: list[str]
    labels: list[int]
    workers: Collectives
    device: torch.device
    steps: int
    networks: Path = Path()
    source_class_names: tuple[str, ...] = ()
    progressed: Progressed = lambda samples: None

    @property
    def seed(self) -> int:
        return self.config.distill_seed


@dataclass(frozen=True)
class FinalOutputs:
    """What belongs to a finished set besides its images and labels.

    Attributes:
        extras: tensors saved with the images (`SyntheticSet.extras`), for example soft labels.
        protocol: fields of `TrainingProtocol` that were learned and replace the method's own, for example `lr`.
        card: further entries of the set's card; JSON values.
    """

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Work outside the steps, for `plan`: `passes` of all kept samples or all synthetic images through one network."""

    what: str  # what the passes are for, such as "train 100 experts"
    network: str
    images: Literal["kept", "synthetic"]
    passes: float
    backward: bool  # True for training, False for inference


class Method:
    """The base class of all methods, and their contract.

    A method without a base class gets these defaults too. It must define `default_steps`, `init_of`, `protocol`, `prepare`,
    `step`, `snapshot`, `state_dict` and `load_state_dict`.

    Attributes:
        parallel: "classes": each worker owns some classes and their images. "replicate": each worker holds all images
            and must keep them identical, for example by summing gradients with `workers.all_reduce_sum`.
        default_steps: steps of a run if `distill.steps` is not set.
        no_runtime: why runtime pruning does not apply; empty for a method that prunes its real batches.
        both_tails: whether the runtime rule `loss` drops the smallest values too (`runtime.tail`).
        batch_norm: whether `distill.network` may have batch norm: "any" or "refused".
        forward_mode: how the method runs its network, said at the start of a run; None: it says nothing. Set by `prepare`.
        ranks_patches: whether the pipeline ranks patches of real images before the first step (RDED).
        section_name: for methods of the package: the name of their section in `distill`.
    """

    parallel: ClassVar[str] = "classes"
    default_steps: ClassVar[int]
    no_runtime: ClassVar[str] = ""
    both_tails: ClassVar[bool] = False
    batch_norm: ClassVar[str] = "refused"
    ranks_patches: ClassVar[bool] = False
    forward_mode: ForwardMode | None = None
    section_name: ClassVar[str]

    def __init__(self, context: MethodContext) -> None: ...

    @classmethod
    def section(cls, config: Config) -> Any:
        return getattr(config.distill, cls.section_name)

    @staticmethod
    def init_of(config: Config) -> str:
        """What the images start from: "noise" or "real". With "real" each class needs at least `ipc` kept samples."""
        raise NotImplementedError

    @staticmethod
    def protocol(config: Config) -> TrainingProtocol:
        """How networks are to be trained on the set; saved in its card.

        Called before anything is computed; raises UserError if the method's configuration is invalid.
        """
        raise NotImplementedError

    @staticmethod
    def first_kept(config: Config) -> int | None:
        """How many kept samples of each class the method reads, those of smallest rank; None: all. Fewer are an error."""
        return None

    @staticmethod
    def networks(config: Config) -> list[str]:
        """File names of the networks (experts, a teacher) to be trained before the first step."""
        return []

    @staticmethod
    def network_options(config: Config) -> dict[str, Any]:
        """The configuration values that these networks depend on, part of their fingerprint; JSON values."""
        return {}

    @staticmethod
    def network_epochs(config: Config) -> int:
        """The epochs over the kept samples that `make_network` reports the progress of; 0: it reports none."""
        return 0

    @staticmethod
    def make_network(name: str, context: MethodContext, real: ClassSampler) -> None:
        """Train the network `name` of `networks` and write it to `context.networks / name` in one step (atomically).

        Runs alone, without other workers, with `real` and `context.labels` covering all classes. If it is killed it is
        called again, so long training should save and resume its progress.
        """
        raise UserError(
            f"distill.method = {context.config.distill.method!r} lists the network {name!r} but has no "
            "make_network(name, context, real); add it"
        )

    @staticmethod
    def costs(config: Config) -> list[Cost]:
        """Work besides the steps: training networks, labelling, ranking."""
        return []

    def prepare(self, real: ClassSampler) -> None:
        """Create the images. Called once, when the networks of `networks` exist; `real` has the classes `labels`."""
        raise NotImplementedError

    def draws(self, step: int) -> Iterable[DrawRequest]:
        """The calls of `real.draw` that `step(step)` will make, in their order, so that they can be read in advance.

        It must not change the method's state. A missing or wrong request costs time and changes no result.
        """
        return ()

    def step(self, i: int) -> dict[str, float]:
        """One outer update of this worker's images; returns values to log, averaged over the workers by their classes.

        All workers call it for the same `i`, so collectives must be called equally often in each.

        Raises DistillationDiverged if a loss or a gradient is not finite; the images are as before the failing update.
        """
        raise NotImplementedError

    def judge(self, step: int) -> Judge:
        """How samples are rated for `select.refresh` after `step(step)`; optional. The images must stay as they are.

        All workers call it, so it may use collectives. A class's values must not depend on which worker owns it.
        """
        raise NotImplementedError

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """The worker's images float32 [n, *shape], normalised, and their labels int64 [n], on the CPU."""
        raise NotImplementedError

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        """What else belongs to the set. Called in every worker with the set of all workers; the result of rank 0 counts."""
        return FinalOutputs()

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes during the steps, on the CPU.

        Keys that belong to a class are `what/label`: states of workers are merged by key, and a run may go on with
        another number of workers.
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the merged state of all workers, of which each takes the keys of its own classes."""
        raise NotImplementedError


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
