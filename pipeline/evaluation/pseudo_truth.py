"""Pseudo ground truth: networks that segment the foreground of an image (paper, section 4.2 and appendix B).

One interface, `Segmentation`: an image in, a mask of the same size out. On the command line:

    fitted              the small segmenter fitted on the shards' ground-truth alpha
    alpha               ground-truth alpha: for real images alone, and only where shards carry it
    tracer-te7=FILE     a network by ONNX or TorchScript file; so bisenet, u2net, u2netp
    maskrcnn=FILE       torchvision's Mask R-CNN (ResNet-50 FPN, COCO) with weights by file
    huggingface=FOLDER  a segmentation model of Hugging Face transformers in a local folder
    module:name         your own `Segmentation`
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data_shards.errors import UserError
from models.ops import min_max
from pipeline.evaluation.features import import_object

FITTED, ALPHA = "fitted", "alpha"
MASK_RCNN, HUGGING_FACE = "maskrcnn", "huggingface"

MASK_RCNN_SCORE = 0.5
"""Least score of an instance that counts as foreground."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmentation(Protocol):
    """``images [b, 3, R, R]`` in [-1, 1] -> probability or coverage of foreground ``[b, 1, R, R]`` in [0, 1]."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Preset:
    """What a published network expects and says; images are normalised by ImageNet's mean and deviation.

    Attributes:
        size: side of its input, pixels.
        divide_by_max: scale each image to a maximum of 1 first.
        to_mask: from its first output ``[b, C, h, w]`` to the mask ``[b, 1, h, w]``.
    """

    size: int
    divide_by_max: bool
    to_mask: Callable[[Tensor], Tensor]


def _probability(output: Tensor) -> Tensor:
    return output[:, :1].clamp(0, 1)


def _stretched(output: Tensor) -> Tensor:
    return min_max(output[:, :1])


def _not_background(output: Tensor) -> Tensor:
    return (output.argmax(dim=1, keepdim=True) != 0).float()


PRESETS = {
    "tracer-te7": Preset(640, False, _probability),
    "bisenet": Preset(512, False, _not_background),  # CelebAMask-HQ's 19 classes; 0 is the background
    "u2net": Preset(320, True, _stretched),  # its authors stretch each map to 0..1
    "u2netp": Preset(320, True, _stretched),
}


class PresetNetwork:
    """A `Segmentation` by a network from a file.

    Args:
        run: ``[b, 3, size, size]`` float32, normalised -> its first output.
        preset: what it expects and says.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], preset: Preset) -> None:
        self._run = run
        self._preset = preset

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = (images.clamp(-1, 1) + 1) / 2
        x = resize(x, self._preset.size)
        if self._preset.divide_by_max:
            x = x / x.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        x = (x - x.new_tensor(IMAGENET_MEAN)[:, None, None]) / x.new_tensor(IMAGENET_STD)[:, None, None]
        return resize(self._preset.to_mask(self._run(x).float()).to(images.device), images.shape[-1]).clamp(0, 1)


class MaskRcnn:
    """A `Segmentation` by torchvision's Mask R-CNN: the union of all instances that it is sure of.

    Args:
        weights: file with the state of ``maskrcnn_resnet50_fpn``.
        device: to compute on.

    Raises:
        UserError: they are not.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        from torchvision.models.detection import maskrcnn_resnet50_fpn  # type: ignore[import-untyped]

        self._network = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        try:
            self._network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises half a dozen kinds for a file that is something else
            raise UserError(
                f"--pseudo-gt {MASK_RCNN}={weights} is no state of torchvision's maskrcnn_resnet50_fpn "
                f"({type(error).__name__}): give its COCO weights"
            ) from None
        self._network.to(device).eval().requires_grad_(False)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Instances of ``images [b, 3, R, R]`` in [0, 1]: of each image ``masks [n, 1, R, R]`` and ``scores [n]``."""
        found: list[dict[str, Tensor]] = self._network(list(images))
        return found

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        masks = []
        for image, found in zip(images, self.detect((images.clamp(-1, 1) + 1) / 2), strict=True):
            sure = found["masks"][found["scores"] >= MASK_RCNN_SCORE]
            masks.append(sure.amax(dim=0) if len(sure) else torch.zeros_like(image[:1]))
        return torch.stack(masks)


class HuggingFace:
    """A `Segmentation` by a semantic segmentation model of transformers: all classes but the background.

    Args:
        folder: with the model and its image processor.
        device: to compute on.

    Raises:
        UserError: transformers is not installed, or the folder holds no such model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
        except ImportError:
            raise UserError(
                f"--pseudo-gt {HUGGING_FACE}={folder} needs transformers: pip install transformers"
            ) from None
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self._model = AutoModelForSemanticSegmentation.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--pseudo-gt {HUGGING_FACE}={folder} holds no segmentation model: {reason}") from None
        self._model.to(device).eval().requires_grad_(False)
        labels = self._model.config.id2label
        self._background = next((i for i, label in labels.items() if label.lower() == "background"), 0)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pictures = list(((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
        inputs = self._processor(images=pictures, return_tensors="pt").to(images.device)
        logits = self._model(**inputs).logits
        if logits.shape[1] == 1:
            mask = torch.sigmoid(logits)
        else:
            mask = 1 - logits.softmax(dim=1)[:, self._background : self._background + 1]
        return resize(mask, images.shape[-1]).clamp(0, 1)


def load_segmentation(spec: str, device: torch.device, *, option: str = "--pseudo-gt") -> tuple[str, Segmentation]:
    """A pseudo ground truth by name, as on the command line: neither `FITTED` nor `ALPHA`.

    Returns:
        Its short name, and the network.

    Raises:
        UserError: it is unknown, its file is missing, or the file is something else.
    """
    kind, equals, path = spec.partition("=")
    if not equals and ":" in spec:
        own: Segmentation = import_object(spec, option)
        return spec.partition(":")[2], own
    if kind not in (*PRESETS, MASK_RCNN, HUGGING_FACE):
        files = ", ".join(f"{name}=FILE" for name in (*PRESETS, MASK_RCNN))
        raise UserError(
            f"{option} {spec} is unknown: give {FITTED}, {ALPHA}, {files}, {HUGGING_FACE}=FOLDER or module:name"
        )
    if not path:
        raise UserError(f"{option} {kind} needs its weights: give {kind}=FILE")
    if not Path(path).exists():
        raise UserError(f"{option} {spec}: {path} does not exist")
    if kind == MASK_RCNN:
        return kind, MaskRcnn(Path(path), device)
    if kind == HUGGING_FACE:
        return kind, HuggingFace(Path(path), device)
    load = _load_onnx if Path(path).suffix == ".onnx" else _load_torchscript
    return kind, PresetNetwork(load(Path(path), device), PRESETS[kind])


def resize(x: Tensor, size: int) -> Tensor:
    """``[b, C, h, w] -> [b, C, size, size]``, bilinear and antialiased."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


def _load_onnx(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [p for p in (*wanted, "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # of onnxruntime's own kinds, which have no common base
        raise UserError(f"{path} is no ONNX network ({type(error).__name__}): export it again") from None
    (given, *_), (first, *_) = session.get_inputs(), session.get_outputs()
    one_by_one = given.shape[0] == 1  # many are exported with a fixed batch

    def run(images: Tensor) -> Tensor:
        parts = images.cpu().split(1 if one_by_one else len(images))
        return torch.cat([torch.from_numpy(session.run([first.name], {given.name: x.numpy()})[0]) for x in parts])

    return run


def _load_torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError:
        raise UserError(f"{path} is no TorchScript network: save it by torch.jit.save, or give an .onnx file") from None

    def run(images: Tensor) -> Tensor:
        output: Any = network(images)
        tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return tensor

    return run
