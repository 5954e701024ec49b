"""How little scoring keeps the accuracy of two images per class (CIFAR-10, DC, one image per class)?

    python jobs/benchmarks/score_budget.py RUN --out FOLDER --settings 32x1x1 32x2x0.5 ... [--repeats 3] [--steps 1000]
        [--networks 3] [--split validation|test] [--reference 128x2x2] [--part scores|accuracy]

RUN is a run folder with a finished ingest. A setting is WIDTHxTRIALSxEPOCHS[bBATCH]; epochs below 1 are one epoch on that
share of each class (`score.share`). Repeat r of a setting has proxies, and a distillation, of its own. Everything else is
that of configs/cifar10_dc_ipc1.yaml. All work is done by the package's own functions, in this process, with one thread;
what is done is kept in FOLDER, so an interrupted command continues. Prints a Markdown table.

Learning rate: for each width, epochs and batch the one with which the first proxy has a mean loss of 1.9 ± 0.05 on 2,000
samples of the training split, averaged over its checkpoints (secant steps on the logarithm, four at most, the nearest counts).

With --steps 0 networks are trained on the 20 images themselves: a screening that takes seconds.
Validation: 500 random images per class of the training split, without those that the setting selected.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distill_at_scale.config.load import Config, load, with_overrides
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.rng import derive, numpy_generator
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation import student
from distill_at_scale.distillation.methods.contract import MethodContext
from distill_at_scale.distillation.methods.dc import DC
from distill_at_scale.experiments.studies.rankings import correlations
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pruning.proxies import train as proxies
from distill_at_scale.pruning.scoring.columns import lists_to_matrix
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path

CPU = torch.device("cpu")
TARGET, TOLERANCE, MOST_FITS = 1.9, 0.05, 4  # of the mean loss
FIT_SAMPLES = 200  # per class
GUESS, GUESS_POWER = 0.049, 0.8  # learning rate at width 16, half an epoch; how it falls with the width
COLUMNS = ("setting", "lr", "mean loss", "CPU s: training + pass", "Spearman", "Jaccard of the 20", "top-1 %", "n")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    width: int
    trials: int
    epochs: float
    batch: int = 256

    @classmethod
    def parse(cls, text: str) -> Setting:
        sizes, _, batch = text.partition("b")
        width, trials, epochs = sizes.split("x")
        return cls(int(width), int(trials), float(epochs), int(batch or 256))

    def __str__(self) -> str:
        return f"{self.width}x{self.trials}x{self.epochs:g}" + (f"b{self.batch}" if self.batch != 256 else "")

    @property
    def proxy(self) -> str:
        """Names what the proxies of settings with more or fewer trials share."""
        return str(replace(self, trials=1))

    @property
    def keys(self) -> dict[str, Any]:
        share = {"score.epochs": max(1, int(self.epochs)), "score.share": min(1.0, self.epochs)}
        return {"score.width": self.width, "score.batch": self.batch, **share}


class Seen:
    """The losses that training computes anyway: of each sample when it was visited in an epoch."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []  # keys and logits

    def recording(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def recorded(pixels: Tensor) -> Tensor:
            logits = forward(pixels)
            self.batches.append((self.key(pixels), logits.detach()))
            return logits

        return recorded

    @staticmethod
    def key(pixels: Tensor) -> Tensor:
        """A number for each image; equal images have equal ones."""
        words = pixels.contiguous().flatten(1).view(torch.int64)
        return (words * (2 * torch.randint(2**62, words.shape[1:], generator=torch.manual_seed(0)) + 1)).sum(1)

    def losses(self, pixels: Tensor, labels: np.ndarray[Any, Any], epochs: int) -> np.ndarray[Any, Any]:
        """float32 [n, epochs]; NaN for a sample that an epoch left out."""
        known, rows = torch.cat([self.key(part) for part in pixels.split(1000)]).sort()
        result = np.full((len(labels), epochs), np.nan, np.float32)
        visits, logits = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        places, each = torch.searchsorted(known, visits).clamp(max=len(known) - 1), len(visits) // epochs
        where, padding = rows[places], known[places] != visits
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)[where], reduction="none")
        for epoch in range(epochs):
            part = slice(epoch * each, (epoch + 1) * each)
            result[where[part][~padding[part]], epoch] = losses[part][~padding[part]]
        return result


class Budget:
    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        self.prepared = PreparedDataset(options.run / "prepared")
        self.base: Config = load("cifar10_dc_ipc1", ["cluster.address=none", *options.set])
        self.out.mkdir(parents=True, exist_ok=True)

    def kept(self, path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The arrays of a file, which is made if it is missing."""
        if not path.exists():
            arrays = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)
        with np.load(path) as saved:
            return dict(saved)

    @cached_property
    def labels(self) -> np.ndarray[Any, Any]:
        return np.repeat(np.arange(len(self.prepared.class_names)), self.prepared.counts("train"))

    @cached_property
    def pixels(self) -> Tensor:
        return torch.from_numpy(self.prepared.load("train")[0])

    # scores

    def config(self, setting: Setting, lr: float) -> Config:
        return with_overrides(self.base, {**setting.keys, "score.lr": lr, "score.trials": 1})

    def lr(self, setting: Setting) -> float:
        """The learning rate of a setting, by the rule of this file."""
        path = self.out / "lr" / f"{setting.proxy}.json"
        tried: list[tuple[float, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        while len(tried) < MOST_FITS and not any(abs(loss - TARGET) <= TOLERANCE for _, loss in tried):
            rate = self._next_lr(setting, tried)
            tried.append((rate, self._mean_loss(self.config(setting, rate), self.out / "fit")))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(tried), encoding="utf-8")
            print(f"{setting.proxy}: lr {rate:.5f}, mean loss {tried[-1][1]:.3f}", flush=True)
        return min(tried, key=lambda pair: abs(pair[1] - TARGET))[0]

    def _next_lr(self, setting: Setting, tried: list[tuple[float, float]]) -> float:
        if not tried:
            return float(
                f"{GUESS * 0.5 / setting.epochs * (16 / setting.width) ** GUESS_POWER * setting.batch / 256:.2g}"
            )
        (rate, loss), slope = tried[-1], -0.25  # a usual change of the loss per factor e
        if len(tried) > 1 and abs(loss - tried[-2][1]) > 0.01:
            slope = (loss - tried[-2][1]) / math.log(rate / tried[-2][0])
        step = max(-1.2, min(1.2, (TARGET - loss) / min(slope, -0.05)))
        return float(f"{rate * math.exp(step):.2g}")

    def _mean_loss(self, config: Config, folder: Path) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        self._train(config, 0, folder)
        rows = np.concatenate([np.flatnonzero(self.labels == k)[:: 5000 // FIT_SAMPLES] for k in range(10)])
        pixels, labels = self.pixels[rows], torch.from_numpy(self.labels[rows])
        normalization, losses = normalization_of(self.prepared, whitened=False), []
        spec = proxies.network_spec(config.score, self.prepared.shape, 10, self.prepared.kind)
        for epoch in range(config.score.epochs):
            network = proxies.load_proxy(spec, proxies.checkpoint_path(folder, 0, epoch), CPU)
            parts = zip(pixels.split(100), labels.split(100), strict=True)
            with torch.no_grad():
                losses += [
                    float(torch.nn.functional.cross_entropy(network(normalization.apply(p)), t)) for p, t in parts
                ]
        return float(np.mean(losses))

    def _train(self, config: Config, trial: int, folder: Path, seen: Seen | None = None) -> None:
        one = proxies.ProxyTrial(self.prepared, config.score, trial, config.run.seed, folder, CPU)
        one.forward = one.forward if seen is None else seen.recording(one.forward)
        one.run()

    def proxy_losses(self, setting: Setting, trial: int) -> dict[str, Any]:
        """losses [n, epochs] of a proxy, and its CPU seconds of training and of the pass."""

        def make() -> dict[str, Any]:
            config, folder = self.config(setting, self.lr(setting)), self.out / "proxies" / f"{setting.proxy}-{trial}"
            seen = Seen() if setting.epochs >= 1 else None
            began = time.process_time()
            self._train(config, trial, folder, seen)
            trained = time.process_time()
            if trial:  # a scorer reads trials 0 .. trials - 1
                shutil.rmtree(folder / "trial-00", ignore_errors=True)
                (folder / f"trial-{trial:02d}").rename(folder / "trial-00")
            parts, chunks = folder / "pieces", self.prepared.chunks("train")
            parts.mkdir(exist_ok=True)
            units = [(chunk, score_part_path(parts, chunk)) for chunk in chunks]
            for _ in Scorer(config, self.prepared.folder, folder, CPU).score(units):
                pass
            losses = np.concatenate([lists_to_matrix(pq.read_table(path)["loss"]) for _, path in units])
            seconds = [trained - began, time.process_time() - trained]
            shutil.rmtree(folder)
            print(f"{setting.proxy} trial {trial}: mean loss {losses.mean():.3f}, CPU s {seconds}", flush=True)
            visited = {} if seen is None else {"visited": seen.losses(self.pixels, self.labels, config.score.epochs)}
            return {"losses": losses, "seconds": np.array(seconds), **visited}

        return self.kept(self.out / "scores" / f"{setting.proxy}-{trial}.npz", make)

    def scores(self, setting: Setting, repeat: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Mean losses [n] and CPU seconds (training, pass) of all trials."""
        first = repeat * setting.trials
        tables = [self.proxy_losses(setting, trial) for trial in range(first, first + setting.trials)]
        return np.mean([table["losses"].mean(1) for table in tables], 0), np.sum([t["seconds"] for t in tables], 0)

    def selected(self, scores: np.ndarray[Any, Any], per_class: int = 2) -> np.ndarray[Any, Any]:
        """The rows of the smallest scores of each class; ids ascend within a class, so ties go to the smaller id."""
        order = np.lexsort((np.arange(len(scores)), scores, self.labels))
        return order.reshape(10, -1)[:, :per_class].reshape(-1)

    # accuracy

    def distilled(self, setting: Setting, repeat: int) -> dict[str, Any]:
        steps = self.options.steps

        def make() -> dict[str, Any]:
            rows = self.selected(self.scores(setting, repeat)[0])
            if steps == 0:
                real = normalization_of(self.prepared).apply(self.pixels[rows]).numpy()
                return {"images": real, "labels": self.labels[rows], "seconds": 0.0, "rows": rows}
            config, began = with_overrides(self.base, {"distill.seed": repeat}), time.process_time()
            spec = self._spec(config)
            method = DC(
                MethodContext(config, spec, self.prepared.class_names, list(range(10)), SingleProcess(), CPU, steps)
            )
            pixels = {k: self.pixels[rows[self.labels[rows] == k]] for k in range(10)}
            method.prepare(ClassSampler(pixels, normalization_of(self.prepared), repeat, CPU))
            start, before = 0, 0.0
            if partial.exists():
                start, before, state = torch.load(partial)
                method.load_state_dict(state)
            for step in range(start, steps):
                method.step(step)
                if step % 100 == 99:
                    seconds = before + time.process_time() - began
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    with publish(partial) as temporary:
                        torch.save((step + 1, seconds, method.state_dict()), temporary)
            images, labels = method.snapshot()
            seconds = before + time.process_time() - began
            print(f"{setting} repeat {repeat}: {steps} steps, CPU s {seconds:.0f}", flush=True)
            return {"images": images.numpy(), "labels": labels.numpy(), "seconds": seconds, "rows": rows}

        path = self.out / f"distilled-{self._how}" / f"{setting}-{repeat}.npz"
        partial = path.with_suffix(".pt")
        return self.kept(path, make)

    @property
    def _how(self) -> str:
        return f"{self.options.steps}-{self.base.distill.width}"

    def _spec(self, config: Config) -> NetworkSpec:
        return NetworkSpec(config.distill.network, self.prepared.shape, 10, config.distill.width, config.distill.depth)

    def accuracy(self, setting: Setting, repeat: int, network: int) -> float:
        split, distilled = self.options.split, self.distilled(setting, repeat)

        def make() -> dict[str, Any]:
            spec, protocol = self._spec(self.base), DC.protocol(self.base).overridden(self.base.evaluate)
            data = student.TrainingSet(torch.from_numpy(distilled["images"]), torch.from_numpy(distilled["labels"]))
            seed = derive(repeat, "evaluation", network)
            trained = student.train(spec, data, protocol, seed, CPU)
            pixels, labels = self._tested(split, distilled["rows"])
            normalization = normalization_of(self.prepared)
            return {"top1": student.test(trained, pixels, labels, normalization, CPU, spec.microbatch(CPU)).top1}

        folder = self.out / f"accuracy-{self._how}-{split}{self.options.validation}"
        return float(self.kept(folder / f"{setting}-{repeat}-{network}.npz", make)["top1"])

    def _tested(self, split: str, rows: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        if split == "test":
            pixels, labels = self.prepared.load("test")
            return torch.from_numpy(pixels), torch.from_numpy(labels)
        draw = numpy_generator(0, "validation part")
        orders = [draw.permutation(np.flatnonzero(self.labels == k)) for k in range(10)]
        held = np.setdiff1d(np.concatenate([order[: self.options.validation // 10] for order in orders]), rows)
        return self.pixels[held], torch.from_numpy(self.labels[held])

    # the table

    def row(
        self, setting: Setting, reference: tuple[np.ndarray[Any, Any], set[int]] | None, accuracy: bool
    ) -> list[str]:
        scored = [self.scores(setting, repeat) for repeat in range(self.options.repeats)]
        tables, seconds = np.stack([table for table, _ in scored]), np.stack([cost for _, cost in scored])
        cells = [
            str(setting),
            f"{self.lr(setting):g}",
            f"{tables.mean():.2f}",
            " + ".join(f"{s:.0f}" for s in seconds.mean(0)),
        ]
        if reference is None:
            cells += ["", ""]
        else:
            agree = [float(correlations(np.stack([t, reference[0]], 1), self.labels)[0][0, 1]) for t in tables]
            chosen = [set(self.selected(table).tolist()) for table in tables]
            jaccard = np.mean([len(own & reference[1]) / len(own | reference[1]) for own in chosen])
            cells += [f"{np.mean(agree):.3f}", f"{jaccard:.2f}"]
        if not accuracy:
            return cells
        pairs = itertools.product(range(self.options.repeats), range(self.options.networks))
        top1 = 100 * np.array([self.accuracy(setting, *pair) for pair in pairs])
        spread = f" ± {top1.std(ddof=1):.1f}" if len(top1) > 1 else ""
        return [*cells, f"{top1.mean():.1f}{spread}", f"{self.options.repeats} × {self.options.networks}"]

    def table(self) -> Iterator[str]:
        yield "| " + " | ".join(COLUMNS) + " |"
        yield "|" + "---|" * len(COLUMNS)
        reference = None
        if self.options.reference:
            losses = self.scores(self.options.reference, 0)[0]
            reference = losses, set(self.selected(losses).tolist())
        for setting in self.options.settings:
            yield "| " + " | ".join(self.row(setting, reference, self.options.part != "scores")) + " |"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", type=Setting.parse, required=True)
    parser.add_argument("--reference", type=Setting.parse)
    parser.add_argument("--part", choices=("scores", "accuracy"), default="accuracy")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--validation", type=int, default=5000)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--set", nargs="*", default=[], help="further keys of the configuration")
    return parser.parse_args(arguments)


def main() -> None:
    torch.set_num_threads(1)
    for line in Budget(options()).table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
