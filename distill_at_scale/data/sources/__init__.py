"""The layouts that data comes in: one file each, and this table of them.

A source says which samples exist (id, label, where) and reads the raw bytes of some of them. It decodes nothing.
"""

from distill_at_scale.data.sources.digits import Digits
from distill_at_scale.data.sources.imagefolder import ImageFolder
from distill_at_scale.data.sources.imagenet import Imagenet
from distill_at_scale.data.sources.imagenet_tar import ImagenetTar
from distill_at_scale.data.sources.kinetics import Kinetics
from distill_at_scale.data.sources.kinetics_tar import KineticsTar
from distill_at_scale.data.sources.parquet import HuggingFaceParquet
from distill_at_scale.data.sources.tiny_imagenet import TinyImagenet
from distill_at_scale.data.sources.torchvision import TorchvisionSet
from distill_at_scale.data.sources.webdataset import WebDataset

SOURCES = {
    "digits": Digits,
    "parquet": HuggingFaceParquet,
    "imagefolder": ImageFolder,
    "imagenet": Imagenet,
    "imagenet_tar": ImagenetTar,
    "kinetics": Kinetics,
    "kinetics_tar": KineticsTar,
    "tiny_imagenet": TinyImagenet,
    "torchvision": TorchvisionSet,
    "webdataset": WebDataset,
}
