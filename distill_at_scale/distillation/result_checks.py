"""What a finished distillation shows about itself: images equal to real ones, a loss that never moved, the share of the real
batches that runtime pruning left out.
"""

from __future__ import annotations

import json
import math
import statistics
from contextlib import suppress
from pathlib import Path

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sampling.placement import kept_places
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.synthetic_set import SyntheticSet

EQUAL = 0.02  # root mean square distance of two samples, in standard deviations of the data; 1.3 of 255 grey levels
MOST_BYTES = 256 * 2**20  # of real samples that are compared, decoded; further classes are not checked
FEWEST_LINES = 3  # of a log whose loss is called constant
SMALLEST_LOSS = 1e-9
SAME_LOSS = 1e-6  # relative


def warnings(config: Config, synthetic: SyntheticSet, data: PreparedDataset, manifest: Path, log: Path) -> list[str]:
    """Sentences about a set that distillation hardly changed; empty for a sound one."""
    result, losses = list[str](), logged(log, "loss")
    if losses and max(map(abs, losses)) <= SMALLEST_LOSS:
        result.append("the loss was 0 at every logged step, so the images did not change")
    elif len(losses) >= FEWEST_LINES and max(losses) - min(losses) <= SAME_LOSS * max(map(abs, losses)):
        result.append(f"the loss was {losses[0]:.4g} at every logged step, so the images learned nothing")
    method = engine.method_class(config)
    if method.ranks_patches or method.first_kept(config):
        return result  # its images are made of real ones
    equal, compared, few = equal_to_real(synthetic, data, manifest)
    if equal:
        if few:
            why = f"{few} classes keep no more samples than distill.ipc = {config.distill.ipc}; raise select.keep"
        else:
            why = "they hardly moved from where they started; raise distill.steps or the learning rate of the images"
        result.append(f"{equal} of {compared} distilled samples equal a kept real sample of their class: {why}")
    return result


def equal_to_real(synthetic: SyntheticSet, data: PreparedDataset, manifest: Path) -> tuple[int, int, int]:
    """Distilled samples that equal a kept real sample of their class up to EQUAL, samples compared, and the number of
    classes with such samples that keep no more real samples than they have distilled ones.

    Classes are compared in order until the real samples of MOST_BYTES were read.
    """
    normalization = synthetic.normalization
    distance = EQUAL * normalization.scale * statistics.fmean(data.std) * math.sqrt(math.prod(data.shape))
    equal = compared = few = read = 0
    for label in synthetic.labels.unique().tolist():
        places = kept_places(data, manifest, [label])[label]
        read += len(places) * data.sample_bytes
        if read > MOST_BYTES and compared:
            break
        ours = normalization.stored(synthetic.images[synthetic.labels == label]).float().flatten(1)
        real = torch.from_numpy(data.take("train", label, places)).float().flatten(1)
        close = int((torch.cdist(ours, real).min(1).values <= distance).sum())
        equal, compared, few = equal + close, compared + len(ours), few + (close > 0 and len(places) <= len(ours))
    return equal, compared, few


def dropped_share(log: Path) -> float | None:
    """The measured share of the real batches that runtime pruning left out, a mean over the logged steps; None without
    measurements.
    """
    shares = logged(log, "real_share")
    return 1 - statistics.fmean(shares) if shares else None


def logged(log: Path, key: str) -> list[float]:
    """The finite values of a key in a distillation's log."""
    values: list[float] = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with suppress(ValueError, KeyError, TypeError):  # the line was cut by an interruption, or lacks the key
            value = float(json.loads(line)[key])
            if math.isfinite(value):
                values.append(value)
    return values
