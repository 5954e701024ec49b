"""The contract of a distillation method: what the loop calls, what it gives and what it gets back.

Order of calls, in every worker: `__init__`, `prepare`, perhaps `load_state_dict`, then `step(i)` for i = 0, 1, ..., with
`snapshot` and `state_dict` between steps, and `finalize` once at the end. `make_network` runs before all that, in a task
of its own per network. A step draws its randomness from (seed, purpose, i) alone, so a state holds no random generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import Collectives
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Progressed
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.spec import NetworkSpec

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
        work: the folder of the unfinished distillation, where `finalize` may write on rank 0.
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
    work: Path = Path()

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
        labels: folder with the labels of views (`soft_labels.StoredLabels`), which is copied into the set; None without them.
    """

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    labels: Path | None = None


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
