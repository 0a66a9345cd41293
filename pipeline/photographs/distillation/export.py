"""The distilled network as ONNX, with a model card."""

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from pipeline.photographs.distillation.network import MattingNetwork

TOLERANCE = 1e-4
OPSET = 18


def export_onnx(network: MattingNetwork, path: Path) -> float:
    """Write the network as ONNX and hold it against torch in onnxruntime, on several sizes and batches.

    Args:
        network: in evaluation mode.
        path: file to write.

    Returns:
        Greatest difference of alpha that was seen, below `TOLERANCE`.

    Raises:
        RuntimeError: it was not.
    """
    import onnxruntime

    network = copy.deepcopy(network).cpu()
    side, stride = network.resolution, network.stride
    height, width = Dim("height_in_strides", min=1), Dim("width_in_strides", min=1)
    shapes = {"images": {0: Dim("batch", min=1), 2: stride * height, 3: stride * width}}
    # The exporter speaks of its passes and of its own deprecations.
    for name in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, side, side + stride),),
            input_names=["images"],
            output_names=["alpha"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    rng = torch.Generator().manual_seed(0)
    for batch, h, w in ((1, side, side), (3, side, side), (1, side + stride, 2 * side)):
        images = torch.rand(batch, 3, h, w, generator=rng) * 2 - 1
        with torch.no_grad():
            expected = network(images).numpy()
        (found,) = session.run(["alpha"], {"images": images.numpy()})
        worst = max(worst, float(np.abs(found - expected).max()))
    if worst > TOLERANCE:
        raise RuntimeError(f"{path} differs from torch by {worst:.1e}, more than {TOLERANCE}")
    return worst


def model_card(
    network: MattingNetwork, facts: Mapping[str, Any], figures: Mapping[str, float], onnx_error: float
) -> str:
    """What the network is, what it wants and what it cannot do, as Markdown.

    Args:
        network: that is described.
        facts: how it was made.
        figures: on generated pairs that it did not learn from.
        onnx_error: greatest difference from torch.
    """
    side, stride = network.resolution, network.stride
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    made = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    return f"""# Matting network distilled from {facts["run"]}

Finds what the run's generator calls foreground, in a photo of the kind that the run was trained on, in one forward
pass. It was taught by the generator's own images and alphas and by the discriminator's mask predictor; no label was
used. U-Net, {num_parameters:,} parameters.

## Files

- `network.pt`: for `python pipeline/segment.py PHOTO... --run RUN`
- `network.onnx`: the same network, opset {OPSET}; alpha differs from torch by at most {onnx_error:.1e}

## Input and output

- `images`: float32 `[batch, 3, height, width]`, RGB, upright, scaled to [-1, 1]: `x / 127.5 - 1`. Height and width are
  multiples of {stride}; the shorter one should be {side}, reduced with antialiasing.
- `alpha`: float32 `[batch, 1, height, width]` in [0, 1]

## How it was made

| | |
| --- | --- |
{made}

## What was measured

On {int(figures["num"]):,} generated pairs that it did not learn from, without augmentation: IoU
{figures["iou_fg"]:.3f} (foreground), {figures["iou_bg"]:.3f} (background), SAD {figures["sad"]:.3f} thousand, mean
squared error {figures["mse"]:.4f}. This says how well it learnt from its teacher, not how good the teacher is: for
that, hold it against ground-truth alpha by `python pipeline/segment.py compare`.

## Limits

It knows the kind of image that the run was trained on and nothing else. What the generator takes for foreground,
right or wrong, so does this network. It sees {side} pixels across the shorter side: what is finer in the alpha of a
larger photo follows the photo's edges.
"""
