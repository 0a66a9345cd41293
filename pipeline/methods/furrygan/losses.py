"""The losses of FurryGAN, one pure function per equation of the paper.

Images are ``[B, 3, R, R]`` in [-1, 1], masks ``[B, 1, R, R]`` in [0, 1], mask predictions ``[B, 1, 16, 16]``; every
loss is a scalar without its weight. What an equation holds constant (its ``sg``) is detached here, so that a caller
cannot forget it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from models.discriminator import MASK_RESOLUTION
from models.fused_ops import input_gradients_alone


def downsample_mask(mask: Tensor) -> Tensor:
    """``Down``: bilinear resize to 16x16, without antialiasing, as the paper's 'bilinear interpolation' reads."""
    return F.interpolate(mask, size=MASK_RESOLUTION, mode="bilinear", align_corners=False)


def d_logistic(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator (Goodfellow et al. 2014): ``softplus(-D(real)) + softplus(D(fake))``."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def g_nonsaturating(logits_fake: Tensor) -> Tensor:
    """Non-saturating loss of the generator (Goodfellow et al. 2014): ``softplus(-D(fake))``."""
    return F.softplus(-logits_fake).mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): squared norm of ``dD/dx`` on real images, mean over the batch, without ``gamma / 2``.

    Args:
        logits: ``[B, 1]``, computed from `images`.
        images: leaf that requires a gradient.
    """
    with input_gradients_alone():
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def mask_prediction(mask: Tensor, mask_pred_composite: Tensor, mask_pred_foreground: Tensor) -> Tensor:
    """L_pred (Eq. 4), trains D: the mask is the target of the prediction from both images that it belongs to."""
    target = downsample_mask(mask.detach())
    return 0.5 * F.mse_loss(mask_pred_composite, target) + 0.5 * F.mse_loss(mask_pred_foreground, target)


def mask_consistency(mask_pred_foreground: Tensor, mask_pred_composite: Tensor) -> Tensor:
    """L_cons (Eq. 5), trains G through the composite: ``MSE(D_m(sg(x_fg)), D_m(x_comp))``."""
    return F.mse_loss(mask_pred_composite, mask_pred_foreground.detach())


def scribble(mask_pred: Tensor, strokes: Tensor) -> Tensor:
    """L_scribble, trains D_m on real images with strokes; the paper's conclusion proposes such, without a formula.

    Squared error of the prediction, bilinearly enlarged, at the pixels of the strokes. Foreground and background weigh
    the same in each image, however long their strokes are, and each image the same; one without strokes is 0.

    Args:
        mask_pred: ``D_m [n, 1, 16, 16]``.
        strokes: ``[n, 2, R, R]``, 1 where a stroke says foreground (first channel) or background (second), else 0.
    """
    enlarged = F.interpolate(mask_pred, size=strokes.shape[-1], mode="bilinear", align_corners=False)
    error = torch.cat([1.0 - enlarged, enlarged], dim=1).square()
    num_pixels = strokes.sum(dim=(2, 3))
    drawn = num_pixels >= 1.0  # less is the rim of a stroke that was moved out of the image
    means = (error * strokes).sum(dim=(2, 3)) / num_pixels.clamp(min=1.0) * drawn
    return (means.sum(dim=1) / drawn.sum(dim=1).clamp(min=1)).mean()


def mask_following(mask: Tensor, mask_pred_foreground: Tensor) -> Tensor:
    """L_follow, trains G where there are scribbles: ``MSE(Down(m), sg(D_m(x_fg)))``.

    L_pred (Eq. 4) makes D_m follow the masks, and L_cons (Eq. 5) holds its two predictions together, whatever the mask
    is: neither brings to the masks what D_m has learnt from strokes. This does.
    """
    return F.mse_loss(downsample_mask(mask), mask_pred_foreground.detach())


def binarization(mask_coarse: Tensor) -> Tensor:
    """L_bin (Eq. 6): ``mean(min(m_c, 1 - m_c))``."""
    return torch.minimum(mask_coarse, 1.0 - mask_coarse).mean()


def mask_area(mask: Tensor) -> Tensor:
    """Share of each image that the mask covers, ``[B, 1, R, R] -> [B]``."""
    return mask.mean(dim=(1, 2, 3))


def area_hinge(area: Tensor, phi1: float) -> Tensor:
    """L_area (Eq. 7): ``mean(max(0, phi1 - area))``.

    Args:
        area: coarse areas. Aligned recipe: ``[B]``, each image has its own hinge. Unaligned recipe: the mean over the
            whole global batch, a scalar, so that one hinge serves all (appendix F).
        phi1: least area.
    """
    return F.relu(phi1 - area).mean()


def fine_area(mask: Tensor, mask_coarse: Tensor, phi2: float) -> Tensor:
    """L_fine (Eq. 9): ``max(0, mean(clip(m - m_c, 0, 1)) - phi2)`` per image.

    The paper prints ``phi2 - mean(1 - c)``, which never fires for phi2 = 0.01; this is what the authors' script does.
    """
    contribution = (mask - mask_coarse).clamp(0.0, 1.0)
    return F.relu(mask_area(contribution) - phi2).mean()


def background_participation(foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """L_bgp (Eq. 10): ``MSE(m sg(x_fg) + (1 - m) sg(x_bg), x_bg)``.

    The target x_bg carries a gradient, as in the authors' script; the equation does not say.
    """
    blend = mask * foreground.detach() + (1.0 - mask) * background.detach()
    return F.mse_loss(blend, background)
