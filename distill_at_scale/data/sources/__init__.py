"""The built-in sources by their names in `data.source`; `base.py` describes the contract of one of your own."""

from distill_at_scale.data.sources.audio import AudioFolder
from distill_at_scale.data.sources.folders import ImageFolder, VideoFolder
from distill_at_scale.data.sources.image.digits import Digits
from distill_at_scale.data.sources.image.hf_parquet import HuggingFaceParquet
from distill_at_scale.data.sources.image.imagenet import Imagenet, ImagenetTar, TinyImagenet
from distill_at_scale.data.sources.image.torchvision import TorchvisionSet
from distill_at_scale.data.sources.image.webdataset import WebDataset
from distill_at_scale.data.sources.tensors import Tensors
from distill_at_scale.data.sources.video.hmdb51 import Hmdb51
from distill_at_scale.data.sources.video.kinetics import Kinetics, KineticsTar
from distill_at_scale.data.sources.video.moving_digits import MovingDigits
from distill_at_scale.data.sources.video.something_v2 import SomethingV2
from distill_at_scale.data.sources.video.ucf101 import Ucf101

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
    "audiofolder": AudioFolder,
    "kinetics": Kinetics,
    "kinetics_tar": KineticsTar,
    "ucf101": Ucf101,
    "hmdb51": Hmdb51,
    "something_v2": SomethingV2,
    "tensors": Tensors,
}
