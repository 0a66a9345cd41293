"""A plain and slow FurryGAN, read from the papers: what `models/` is tested and timed against.

Nothing here comes from `models/` or `pipeline/`. The functions take their numbers from a module's named parameters and
compute everything the long way: per-sample weights, zeros inserted before filtering, loops over stddev groups, the
discriminator once for each minibatch. They calculate in the dtype of their input, so that float64 latents or images
give a float64 answer, and gradients reach the parameters.

Layers: Karras et al. 2018 (equalised scale, minibatch stddev) and 2020 (modulation, resampling); networks: FurryGAN.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]

SQRT2 = math.sqrt(2.0)
BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)
MAPPING_LR_MULTIPLIER = 0.01
MASK_RESOLUTION = 16


@dataclass(frozen=True)
class ReferenceImages:
    """Images ``[B or b, 3, R, R]`` and masks ``[B, 1, R, R]``, named as in the paper's Eqs. 1 to 3."""

    foreground: Tensor
    background: Tensor
    mask_coarse: Tensor
    mask_fine: Tensor
    mask: Tensor
    composite: Tensor


@dataclass(frozen=True)
class ReferenceJudgement:
    """Logits ``[k, 1]`` of the judged images, mask predictions ``[n, 1, 16, 16]`` of all; None without a predictor."""

    logits: Tensor
    mask_pred: Tensor | None


def reference_generator(
    generator: nn.Module, z: Tensor, noise: Tensor, fade_in: float = 1.0, num_composites: int | None = None
) -> ReferenceImages:
    """Everything that a FurryGAN generator makes of its latents, without truncation.

    Args:
        generator: whose parameters to use.
        z: ``[B, 384]``.
        noise: ``[B, N]``, one value a pixel of each styled convolution's output, in the order foreground synthesis,
            coarse mask, fine mask, background synthesis.
        fade_in: gamma of Eq. 3.
        num_composites: b, how many first samples get a background; all by default.
    """
    parameters = _parameters(generator, z.dtype)
    b = len(z) if num_composites is None else num_composites
    noise_maps = _NoiseMaps(noise)

    w_foreground = mapping(_below(parameters, "mapping_foreground"), z)
    foreground, features = synthesis(_below(parameters, "synthesis_foreground"), w_foreground, noise_maps)
    mask_coarse = mask_network(_below(parameters, "mask_network_coarse"), features, w_foreground, noise_maps)
    fine_parameters = _below(parameters, "mask_network_fine")
    if fine_parameters:
        mask_fine = mask_network(fine_parameters, features, w_foreground, noise_maps)
    else:
        noise_maps.take(len(z), features.shape[-1])
        mask_fine = 0.0 * mask_coarse
    mask = (mask_coarse + fade_in * mask_fine).clip(0.0, 1.0)  # Eq. 3

    background_parameters = _below(parameters, "mapping_background")
    z_background = z[:b, : background_parameters["layers.0.weight"].shape[1]]
    w_background = mapping(background_parameters, z_background)
    background, _ = synthesis(_below(parameters, "synthesis_background"), w_background, noise_maps)
    composite = mask[:b] * foreground[:b] + (1.0 - mask[:b]) * background  # Eq. 1
    return ReferenceImages(foreground, background, mask_coarse, mask_fine, mask, composite)


def reference_discriminator(
    discriminator: nn.Module, images: Tensor, judged: Sequence[int] | None = None
) -> ReferenceJudgement:
    """Judge minibatches one after the other, as if each were alone, and predict the masks of all images.

    Args:
        discriminator: whose parameters to use.
        images: ``[n, 3, R, R]``.
        judged: lengths of the minibatches at the front of `images` that get logits; all as one by default.
    """
    parameters = _parameters(discriminator, images.dtype)
    minibatches = images[: sum(judged)].split(list(judged)) if judged is not None else [images]
    logits = torch.cat([_judge_minibatch(parameters, minibatch) for minibatch in minibatches])
    predictor = _below(parameters, "mask_predictor")
    if not predictor:
        return ReferenceJudgement(logits, None)
    return ReferenceJudgement(logits, mask_predictor(predictor, _features_at_mask_resolution(parameters, images)))


def reference_mask_prediction(discriminator: nn.Module, images: Tensor) -> Tensor:
    """``D_m`` alone, ``[n, 3, R, R] -> [n, 1, 16, 16]``."""
    parameters = _parameters(discriminator, images.dtype)
    return mask_predictor(_below(parameters, "mask_predictor"), _features_at_mask_resolution(parameters, images))


def reference_d_main(
    generator: nn.Module,
    discriminator: nn.Module,
    images: Tensor,
    z: Tensor,
    noise: Tensor,
    fade_in: float,
    *,
    dual_fake_input: bool = True,
) -> dict[str, Tensor]:
    """Terms of Eqs. 4 and 11 for B real images and B latents: real and dual fake (or composites alone) judged apart."""
    b = len(z) // 2 if dual_fake_input else len(z)
    with torch.no_grad():
        made = reference_generator(generator, z, noise, fade_in, b)
    real = reference_discriminator(discriminator, images)
    fake = reference_discriminator(discriminator, torch.cat([made.composite, made.foreground[b:]]))
    terms = {"adversarial": torch.log1p((-real.logits).exp()).mean() + torch.log1p(fake.logits.exp()).mean()}
    if fake.mask_pred is not None:
        target = down(made.mask[:b])
        from_foreground = reference_mask_prediction(discriminator, made.foreground[:b])
        errors = (fake.mask_pred[:b] - target).square().mean(), (from_foreground - target).square().mean()
        terms["prediction"] = (errors[0] + errors[1]) / 2
    return terms


def reference_d_r1(discriminator: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Squared norm of the slope at real images, mean over the batch, without gamma / 2 (Mescheder et al. 2018)."""
    images = images.detach().clone().requires_grad_()
    logits = reference_discriminator(discriminator, images).logits
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return {"r1": slope.square().sum(dim=(1, 2, 3)).mean()}


def reference_g_main(
    generator: nn.Module,
    discriminator: nn.Module,
    z: Tensor,
    noise: Tensor,
    fade_in: float,
    *,
    phi1: float,
    phi2: float,
    area_over_batch: bool = False,
    dual_fake_input: bool = True,
    with_consistency: bool = True,
    with_participation: bool = True,
) -> dict[str, Tensor]:
    """Terms of Eqs. 5 to 10 and 12 for B latents; two of them are not due at every iteration."""
    b = len(z) // 2 if dual_fake_input else len(z)
    out = reference_generator(generator, z, noise, fade_in, b)
    fake = reference_discriminator(discriminator, torch.cat([out.composite, out.foreground[b:]]))
    area = out.mask_coarse.mean(dim=(1, 2, 3))
    terms = {
        "adversarial": torch.log1p((-fake.logits).exp()).mean(),
        "binarization": torch.where(out.mask_coarse < 0.5, out.mask_coarse, 1.0 - out.mask_coarse).mean(),
        "area": hinge(phi1 - area.mean()) if area_over_batch else hinge(phi1 - area).mean(),
    }
    if _below(_parameters(generator, z.dtype), "mask_network_fine"):
        fine = (out.mask - out.mask_coarse)[:b].clip(0.0, 1.0).mean(dim=(1, 2, 3))
        terms["fine"] = hinge(fine - phi2).mean()
    if with_consistency and fake.mask_pred is not None:
        from_foreground = reference_mask_prediction(discriminator, out.foreground[:b].detach())
        terms["consistency"] = (from_foreground.detach() - fake.mask_pred[:b]).square().mean()
    if with_participation:
        m, x_fg, x_bg = out.mask[:b], out.foreground[:b].detach(), out.background
        terms["participation"] = (x_fg * m + (1.0 - m) * x_bg.detach() - x_bg).square().mean()
    return terms


def down(mask: Tensor) -> Tensor:
    """Bilinear resize to 16x16 at a whole factor: the mean of the two by two pixels in the middle of each cell."""
    factor = mask.shape[-1] // MASK_RESOLUTION
    cells = mask.reshape(len(mask), 1, MASK_RESOLUTION, factor, MASK_RESOLUTION, factor)
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    return cells[:, :, :, middle][..., middle].mean(dim=(3, 5))


def hinge(x: Tensor) -> Tensor:
    return x.clip(min=0.0)


def upfirdn2d(
    x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0), gain: float = 1.0
) -> Tensor:
    """Insert zeros, pad, filter each channel, keep every `down`-th pixel.

    Args:
        x: ``[B, C, H, W]``.
        kernel: ``[k, k]``, convolved (flipped), not correlated.
        up: factor of zero insertion; the zeros come after each pixel, also after the last.
        down: stride of the output.
        padding: zeros before and after, in height and width alike.
        gain: factor on the output.
    """
    b, channels, height, width = x.shape
    x = F.pad(x.reshape(b, channels, height, 1, width, 1), [0, up - 1, 0, 0, 0, up - 1])
    x = F.pad(x.reshape(b, channels, height * up, width * up), [*padding, *padding])
    x = x.reshape(b * channels, 1, *x.shape[2:])
    x = F.conv2d(x, kernel.flip(0, 1)[None, None] * gain)
    x = x.reshape(b, channels, *x.shape[2:])
    return x[:, :, ::down, ::down]


def blur_kernel(like: Tensor) -> Tensor:
    """StyleGAN2's ``[1, 3, 3, 1]`` filter as a ``[4, 4]`` kernel of sum 1."""
    taps = torch.tensor(BLUR_TAPS, dtype=like.dtype, device=like.device)
    kernel = torch.outer(taps, taps)
    return kernel / kernel.sum()


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, upsample: bool = False
) -> Tensor:
    """Convolve each sample with weights of its own (Karras et al. 2020, Eqs. 1 and 3), as one grouped convolution.

    Args:
        x: ``[B, I, H, W]``.
        weight: ``[O, I, k, k]`` with the equalised scale.
        style: ``[B, I]``.
        demodulate: bring each sample's output channels to unit scale.
        upsample: insert zeros between the pixels, convolve in full, blur with gain 4.
    """
    b, in_channels, height, width = x.shape
    out_channels, _, size, _ = weight.shape
    # torch 2.15 on the CPU gives grouped convolutions of channels-last tensors wrong weight gradients at batch 1.
    x = x.contiguous()
    weights = weight[None] * style[:, None, :, None, None]
    if demodulate:
        weights = weights / (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    weights = weights.reshape(b * out_channels, in_channels, size, size)

    if upsample:
        x = F.pad(x.reshape(b, in_channels, height, 1, width, 1), [0, 1, 0, 0, 0, 1])
        x = x.reshape(1, b * in_channels, 2 * height, 2 * width)[:, :, :-1, :-1]
        x = F.conv2d(x, weights.flip(2, 3), padding=size - 1, groups=b)
        x = x.reshape(b, out_channels, *x.shape[2:])
        return upfirdn2d(x, blur_kernel(x), padding=(1, 1), gain=4.0)
    x = F.conv2d(x.reshape(1, b * in_channels, height, width), weights, padding=size // 2, groups=b)
    return x.reshape(b, out_channels, height, width)


def minibatch_stddev(x: Tensor, group_size: int = 4) -> Tensor:
    """Append each group's standard deviation, averaged over features and pixels, as a channel (Karras et al. 2018).

    Args:
        x: ``[n, C, H, W]``; group g of a batch of n holds samples g, g + n/4, g + 2n/4, g + 3n/4.
        group_size: 4, or n where that is less.
    """
    n = len(x)
    num_groups = n // min(group_size, n)
    channel = torch.empty(n, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    for g in range(num_groups):
        members = list(range(g, n, num_groups))
        deviation = x[members] - x[members].mean(dim=0)
        channel[members] = (deviation.square().mean(dim=0) + 1e-8).sqrt().mean()
    return torch.cat([x, channel], dim=1)


def min_max(x: Tensor) -> Tensor:
    """Scale each image to [0, 1] by its own extremes (Eq. 2)."""
    low = torch.stack([image.min() for image in x])[:, None, None, None]
    high = torch.stack([image.max() for image in x])[:, None, None, None]
    return (x - low) / (high - low + 1e-10)


def leaky_relu(x: Tensor) -> Tensor:
    """Slope 0.2, gain sqrt(2)."""
    return torch.where(x > 0, x, 0.2 * x) * SQRT2


def linear(parameters: Parameters, x: Tensor, *, lr_multiplier: float = 1.0) -> Tensor:
    """Equalised linear layer: the weight's scale is 1/sqrt(fan in) times the multiplier, the bias's the multiplier."""
    weight = parameters["weight"]
    return x @ weight.T * (lr_multiplier / math.sqrt(weight.shape[1])) + parameters["bias"] * lr_multiplier


def mapping(parameters: Parameters, z: Tensor) -> Tensor:
    """``z -> w``: pixel norm and two linear layers with leaky ReLU."""
    x = z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    for i in range(2):
        x = leaky_relu(linear(_below(parameters, f"layers.{i}"), x, lr_multiplier=MAPPING_LR_MULTIPLIER))
    return x


def styled_conv(parameters: Parameters, x: Tensor, w: Tensor, noise: "_NoiseMaps", *, upsample: bool = False) -> Tensor:
    """Modulated convolution, noise, bias, leaky ReLU."""
    style = linear(_below(parameters, "conv.modulation"), w)
    x = modulated_conv2d(x, _equalised(parameters["conv.weight"]), style, upsample=upsample)
    x = x + parameters["noise_strength"] * noise.take(len(x), x.shape[-1])
    return leaky_relu(x + parameters["bias"][None, :, None, None])


def synthesis(parameters: Parameters, w: Tensor, noise: "_NoiseMaps") -> tuple[Tensor, Tensor]:
    """StyleGAN2 synthesis without RGB skips, ``w -> image, last features``: each odd layer but the first upsamples."""
    x = parameters["constant"].repeat(len(w), 1, 1, 1)
    for i in range(_count(parameters, "layers")):
        x = styled_conv(_below(parameters, f"layers.{i}"), x, w, noise, upsample=i % 2 == 1)
    to_rgb = _below(parameters, "to_rgb")
    style = linear(_below(to_rgb, "conv.modulation"), w)
    rgb = modulated_conv2d(x, _equalised(to_rgb["conv.weight"]), style, demodulate=False)
    return torch.tanh(rgb + to_rgb["bias"][None, :, None, None]), x


def mask_network(parameters: Parameters, features: Tensor, w: Tensor, noise: "_NoiseMaps") -> Tensor:
    """One 1x1 styled convolution to 32 channels, ReLU, channel mean, min-max (Eq. 2)."""
    x = styled_conv(_below(parameters, "conv"), features, w, noise)
    return min_max(x.clip(min=0.0).mean(dim=1, keepdim=True))


def residual_block(parameters: Parameters, x: Tensor) -> Tensor:
    """3x3 and strided 3x3 convolution, plus a linear strided 1x1 skip, over sqrt(2)."""
    skip = _downsampling_conv(_below(parameters, "skip"), x)
    x = _activated(parameters["conv1.bias"], _reflecting_conv(_below(parameters, "conv1"), x))
    x = _activated(parameters["conv2.bias"], _downsampling_conv(_below(parameters, "conv2"), x))
    return (x + skip) / SQRT2


def mask_predictor(parameters: Parameters, features: Tensor) -> Tensor:
    """``D_m``: residual block of two 1x1 convolutions with a linear skip, ReLU, channel mean, min-max."""
    x = _activated(parameters["conv1.bias"], F.conv2d(features, _equalised(parameters["conv1.weight"])))
    x = _activated(parameters["conv2.bias"], F.conv2d(x, _equalised(parameters["conv2.weight"])))
    x = (x + F.conv2d(features, _equalised(parameters["skip.weight"]))) / SQRT2
    return min_max(x.clip(min=0.0).mean(dim=1, keepdim=True))


class _NoiseMaps:
    """Hands out flat noise ``[B, N]`` in order, a map at a time."""

    def __init__(self, noise: Tensor) -> None:
        self._rest = noise

    def take(self, num_samples: int, resolution: int) -> Tensor:
        """The next map, ``[num_samples, 1, resolution, resolution]``."""
        values = self._rest[:num_samples, : resolution**2]
        self._rest = self._rest[:, resolution**2 :]
        return values.reshape(num_samples, 1, resolution, resolution)


def _features_at_mask_resolution(parameters: Parameters, images: Tensor) -> Tensor:
    x = _activated(parameters["from_rgb.bias"], F.conv2d(images, _equalised(parameters["from_rgb.weight"])))
    for block in _blocks(parameters, "blocks_to_mask"):
        x = residual_block(block, x)
    assert x.shape[-1] == MASK_RESOLUTION
    return x


def _judge_minibatch(parameters: Parameters, images: Tensor) -> Tensor:
    x = _features_at_mask_resolution(parameters, images)
    for block in _blocks(parameters, "blocks_to_logits"):
        x = residual_block(block, x)
    x = _reflecting_conv(_below(parameters, "final_conv"), minibatch_stddev(x))
    x = _activated(parameters["final_conv.bias"], x).reshape(len(images), -1)
    return linear(_below(parameters, "final_linear.1"), leaky_relu(linear(_below(parameters, "final_linear.0"), x)))


def _reflecting_conv(parameters: Parameters, x: Tensor) -> Tensor:
    """3x3 convolution that mirrors the rows and columns next to the border."""
    rows = [1, *range(x.shape[2]), x.shape[2] - 2]
    columns = [1, *range(x.shape[3]), x.shape[3] - 2]
    return F.conv2d(x[:, :, rows][:, :, :, columns], _equalised(parameters["weight"]))


def _downsampling_conv(parameters: Parameters, x: Tensor) -> Tensor:
    """Blur, then convolve at every other pixel."""
    weight = _equalised(parameters["weight"])
    margin = 1 + weight.shape[-1] // 2  # the filter's own and the convolution's
    return F.conv2d(upfirdn2d(x, blur_kernel(x), padding=(margin, margin)), weight)[:, :, ::2, ::2]


def _activated(bias: Tensor, x: Tensor) -> Tensor:
    return leaky_relu(x + bias[None, :, None, None])


def _equalised(weight: Tensor) -> Tensor:
    return weight / math.sqrt(weight[0].numel())


def _parameters(module: nn.Module, dtype: torch.dtype) -> Parameters:
    return {name: parameter.to(dtype).contiguous() for name, parameter in module.named_parameters()}


def _below(parameters: Parameters, prefix: str) -> Parameters:
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in parameters.items() if name.startswith(start)}


def _count(parameters: Parameters, prefix: str) -> int:
    return len({name.split(".")[0] for name in _below(parameters, prefix)})


def _blocks(parameters: Parameters, prefix: str) -> Iterator[Parameters]:
    return (_below(parameters, f"{prefix}.{i}") for i in range(_count(parameters, prefix)))
