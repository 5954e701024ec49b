"""The layouts that data comes in: one file each, and this table of them.

A source says which samples exist (id, label, where) and reads the raw bytes of some of them. It decodes nothing.
"""

from distill_at_scale.data.sources.digits import Digits
from distill_at_scale.data.sources.hmdb51 import Hmdb51
from distill_at_scale.data.sources.imagefolder import ImageFolder
from distill_at_scale.data.sources.imagenet import Imagenet
from distill_at_scale.data.sources.imagenet_tar import ImagenetTar
from distill_at_scale.data.sources.kinetics import Kinetics
from distill_at_scale.data.sources.kinetics_tar import KineticsTar
from distill_at_scale.data.sources.moving_digits import MovingDigits
from distill_at_scale.data.sources.parquet import HuggingFaceParquet
from distill_at_scale.data.sources.something_v2 import SomethingV2
from distill_at_scale.data.sources.tensors import Tensors
from distill_at_scale.data.sources.tiny_imagenet import TinyImagenet
from distill_at_scale.data.sources.torchvision import TorchvisionSet
from distill_at_scale.data.sources.ucf101 import Ucf101
from distill_at_scale.data.sources.videofolder import VideoFolder
from distill_at_scale.data.sources.webdataset import WebDataset

SOURCES = {
    "digits": Digits,
    "parquet": HuggingFaceParquet,
    "imagefolder": ImageFolder,
    "imagenet": Imagenet,
    "imagenet_tar": ImagenetTar,
    "tiny_imagenet": TinyImagenet,
    "torchvision": TorchvisionSet,
    "webdataset": WebDataset,
    "moving_digits": MovingDigits,
    "videofolder": VideoFolder,
    "kinetics": Kinetics,
    "kinetics_tar": KineticsTar,
    "ucf101": Ucf101,
    "hmdb51": Hmdb51,
    "something_v2": SomethingV2,
    "tensors": Tensors,
}
