"""Networks for clips: shapes, what they see of time, and that images and clips are not mistaken for each other."""

from __future__ import annotations

import pytest
import torch

from distill_at_scale.core.errors import UserError
from distill_at_scale.models.spec import OF_CLIPS, MemoryFormat, NetworkSpec, mixes_samples, widest_layer
from distill_at_scale.models.video import ConvNet3D

CLIP = (8, 3, 32, 32)


@pytest.mark.parametrize("name", [*sorted(OF_CLIPS), "frame:convnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_for_clips_gives_one_logit_per_class(name, channels):
    network = NetworkSpec(name, (8, channels, 32, 32), 5, width=8).build(0).eval()
    assert network(torch.randn(2, 8, channels, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", ["convnet3d", "r3d_18", "r2plus1d_18"])
def test_clips_of_a_batch_do_not_see_each_other(name):
    network = NetworkSpec(name, CLIP, 5, width=8).build(0).train()
    clips = torch.randn(3, *CLIP)
    assert not mixes_samples(network)
    torch.testing.assert_close(network(clips)[1:], network(clips[1:]), rtol=1e-4, atol=1e-5)


def test_batch_norm_is_present_if_configured():
    assert mixes_samples(NetworkSpec("r3d_18_bn", CLIP, 5).build(0))


@pytest.mark.parametrize("name", ["convnet3d", "r3d_18"])
def test_a_network_for_clips_sees_the_order_of_the_frames(name):
    network = NetworkSpec(name, CLIP, 5, width=8).build(0).eval()
    clip = torch.randn(1, *CLIP)
    assert (network(clip) - network(clip.flip(1))).abs().max() > 1e-3


def test_the_control_sees_the_middle_frame_and_nothing_else():
    network = NetworkSpec("frame:convnet", CLIP, 5, width=8).build(0)
    clip = torch.randn(1, *CLIP)
    other = torch.randn(1, *CLIP)
    other[:, 4] = clip[:, 4]
    torch.testing.assert_close(network(clip), network(other))


def test_time_is_halved_by_every_pooling_but_the_first_until_one_frame_is_left():
    network = ConvNet3D((8, 3, 64, 64), 5, width=4)  # depth 4: 8 -> 8 -> 4 -> 2 -> 1 frames
    assert network.embed(torch.zeros(1, 8, 3, 64, 64)).shape == (1, 4 * 1 * 4 * 4)
    assert ConvNet3D((2, 3, 64, 64), 5, width=4).embed(torch.zeros(1, 2, 3, 64, 64)).shape == (1, 4 * 1 * 4 * 4)


def test_the_middle_of_the_network_is_torchvisions_own_with_batch_norm():
    from torchvision.models import video

    network = NetworkSpec("r3d_18_bn", (4, 3, 32, 32), 5).build(0).eval()
    original = video.r3d_18(num_classes=5).eval()
    names = {f"classifier{k[2:]}" if k.startswith("fc.") else f"net.{k}": v for k, v in original.state_dict().items()}
    network.load_state_dict(names)
    clips = torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(network(clips), original(clips.transpose(1, 2)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("convnet", CLIP, "takes images, the data are clips; take one of convnet3d"),
        ("convnet3d", (3, 32, 32), "takes clips, the data are images; set data.frames"),
        ("frame:convnet", (3, 32, 32), "leave 'frame:' out"),
        ("torchvision:resnet18", CLIP, "takes images, the data are clips"),
        ("r3d_18", (2, 3, 32, 32), "at least 4 frames"),
        ("convnet3d", (8, 3, 2, 2), None),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, message):
    spec = NetworkSpec(name, shape, 5, width=4)
    if message is None:
        spec.build(0)
        return
    with pytest.raises(UserError, match=message):
        spec.build(0)


def test_a_network_too_deep_for_the_picture_is_refused():
    with pytest.raises(UserError, match="too deep for 8 x 8"):
        NetworkSpec("convnet3d", (8, 3, 8, 8), 5, 4, depth=4).build(0)


def test_the_widest_layer_counts_all_frames():
    assert widest_layer(NetworkSpec("convnet3d", (8, 3, 32, 32), 5, 16)) == 8 * 16 * 32 * 32 * 4


@pytest.mark.parametrize("name", ["convnet3d", "frame:convnet"])
def test_channels_last_changes_the_memory_and_nothing_else(name):
    spec = NetworkSpec(name, CLIP, 5, 8)
    clips = torch.randn(2, *CLIP)
    laid = MemoryFormat(spec, True).images(clips)
    assert torch.equal(laid, clips)
    assert laid.transpose(1, 2).is_contiguous(memory_format=torch.channels_last_3d)
    network = spec.build(0)
    before = network(clips)
    torch.testing.assert_close(MemoryFormat(spec, True).network(network)(laid), before, rtol=1e-4, atol=1e-5)
