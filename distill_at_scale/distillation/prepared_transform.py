"""The transform that turns a real image into what a network trained on a synthetic set expects.

`SyntheticSet.test_transform` builds it: the resize of ingest, then the normalisation of the set's card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import ImageDecoder, SampleRejected
from distill_at_scale.data.prepared.normalization import Normalization

RESIZES = ("square", "crop")


class ResizeAsPrepared(v2.Transform):
    """A PIL image, or a uint8 tensor [..., C, H, W] -> uint8 [..., channels, size, size], as ingest stores it.

    Turns by EXIF orientation, converts to grey or RGB, stretches or crops to the square, resizes with antialiased bicubic.
    """

    def __init__(self, size: int, channels: int, resize: str):
        super().__init__()
        self.size, self.channels, self.resize = size, channels, resize

    def transform(self, inpt: Any, params: dict[str, Any]) -> Tensor:
        decoder = ImageDecoder(self.size, self.channels, self.resize)
        try:
            if isinstance(inpt, Image.Image):
                return torch.from_numpy(decoder.fit(inpt).copy())
            if inpt.dtype == torch.uint8 and inpt.dim() >= 3 and inpt.shape[-3] in (1, 3, 4):
                rows = inpt.flatten(0, -4) if inpt.dim() > 3 else inpt[None]
                fitted = np.stack([decoder(image.permute(1, 2, 0).contiguous().numpy()) for image in rows])
                return torch.from_numpy(fitted).view(*inpt.shape[:-3], *fitted.shape[1:])
        except SampleRejected as error:
            raise UserError(f"test_transform cannot use this image: {error}") from None
        raise UserError(
            f"test_transform takes a PIL image or a uint8 tensor [..., C, H, W] with C = 1 or 3, not {inpt.dtype} "
            f"{list(inpt.shape)}; give the image before any conversion to floats"
        )

    def extra_repr(self) -> str:
        return f"size={self.size}, channels={self.channels}, resize={self.resize!r}"


class NormalizeAsPrepared(v2.Transform):
    """Stored values [..., *shape] -> float32 of the same shape, normalised (and whitened) as the synthetic images are.

    Stored values are uint8 for images and clips, and numbers on the scale of the real data for other arrays.
    """

    def __init__(self, normalization: Normalization, shape: Sequence[int]):
        super().__init__()
        self.normalization, self.shape = normalization, tuple(shape)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Tensor:
        if inpt.shape[inpt.dim() - len(self.shape) :] != self.shape:
            what = f"a sample of shape {list(inpt.shape)}, and the set's samples have the shape {list(self.shape)}"
            raise UserError(f"test_transform got {what}; of a video, draw {self.shape[0]} frames first")
        samples = inpt.reshape(-1, *self.shape)
        return self.normalization.apply(samples).view(inpt.shape)

    def extra_repr(self) -> str:
        facts = self.normalization
        return f"mean={list(facts.mean)}, std={list(facts.std)}, whitening={facts.whitening is not None}"


def prepared_transform(
    card: Mapping[str, Any], shape: Sequence[int], normalization: Normalization, resize: str | None
) -> v2.Compose:
    """The transform for the real data of the set with this card; `resize` replaces the card's.

    Raises UserError if neither names the resize.
    """
    normalize = NormalizeAsPrepared(normalization, shape)
    if normalization.scale == 1:
        return v2.Compose([normalize])
    resize = resize or card.get("resize")
    if resize not in RESIZES:
        raise UserError(
            "the card of this set does not say how real images are resized, since an older version wrote it; call "
            "test_transform(resize=...) with data.resize of its run (run.json has it): 'square' (the default) or 'crop'"
        )
    return v2.Compose([ResizeAsPrepared(shape[-1], shape[-3], resize), normalize])
