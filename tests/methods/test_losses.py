"""Each loss has the value that its equation gives by hand, and moves what the paper lets it move."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.masks import combine_masks
from pipeline.methods.furrygan import losses

PHI1, PHI2 = 0.35, 0.01


def mask_of(*values: float) -> Tensor:
    """One image of `len(values)` pixels, ``[1, 1, 1, n]``, that wants a gradient."""
    return torch.tensor(values)[None, None, None].requires_grad_()


def masks_of_areas(*areas: float) -> Tensor:
    """Constant masks ``[B, 1, 2, 2]``."""
    return torch.tensor(areas)[:, None, None, None].repeat(1, 1, 2, 2).requires_grad_()


def random_masks(*shape: int) -> Tensor:
    return torch.rand(shape).requires_grad_()


def gradient(loss: Tensor, of: Tensor) -> Tensor | None:
    return torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True)[0]


# Adversarial


def test_discriminator_loss_is_softplus_of_both_sides() -> None:
    real, fake = torch.tensor([[math.log(3.0)], [0.0]]), torch.tensor([[math.log(7.0)], [0.0]])
    # softplus(-log 3) = log(4/3), softplus(log 7) = log 8, softplus(0) = log 2.
    expected = (math.log(4 / 3) + math.log(2)) / 2 + (math.log(8) + math.log(2)) / 2
    assert losses.d_logistic(real, fake).item() == pytest.approx(expected, rel=1e-6)


def test_generator_loss_does_not_saturate() -> None:
    fake = torch.tensor([[-math.log(3.0)], [0.0]], requires_grad=True)
    loss = losses.g_nonsaturating(fake)
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-6)  # softplus(log 3) = log 4
    # d softplus(-s) / ds = -sigmoid(-s): a fake that is found out pulls the hardest.
    torch.testing.assert_close(gradient(loss, fake), torch.tensor([[-3 / 4], [-1 / 2]]) / 2)


def test_r1_equals_its_closed_form_for_a_quadratic_discriminator() -> None:
    images = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    logits = (a * images + 0.5 * b * images**2).sum(dim=(1, 2, 3))[:, None]  # D(x) = a x + x diag(b) x / 2
    penalty = losses.r1_penalty(logits, images)
    slope = (a + b * images).detach()
    # mean over images of |a + b x|^2, and its derivatives 2 (a + b x) and 2 (a + b x) x; no gamma / 2.
    torch.testing.assert_close(penalty, slope.square().sum(dim=(1, 2, 3)).mean(), rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(gradient(penalty, a), (2 * slope).mean(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(penalty, b), (2 * slope * images.detach()).mean(dim=0), rtol=1e-6, atol=1e-6)


# Mask prediction and consistency


def test_down_averages_the_two_by_two_pixels_in_the_middle() -> None:
    at_32, at_64 = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 64, 64)
    # 32 -> 16: sample points lie between pixels 2i and 2i + 1; 64 -> 16: between 4i + 1 and 4i + 2. No antialiasing.
    by_hand_32 = sum(at_32[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    by_hand_64 = sum(at_64[:, :, i::4, j::4] for i in (1, 2) for j in (1, 2)) / 4
    torch.testing.assert_close(losses.downsample_mask(at_32), by_hand_32)
    torch.testing.assert_close(losses.downsample_mask(at_64), by_hand_64)
    at_16 = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(losses.downsample_mask(at_16), at_16)


def test_mask_prediction_is_half_of_each_error() -> None:
    mask = torch.full((2, 1, 32, 32), 0.5)
    composite, foreground = torch.full((2, 1, 16, 16), 0.1), torch.full((2, 1, 16, 16), 0.8)
    # (0.5 - 0.1)^2 / 2 + (0.5 - 0.8)^2 / 2 = 0.08 + 0.045
    assert losses.mask_prediction(mask, composite, foreground).item() == pytest.approx(0.125, rel=1e-5)


def test_mask_prediction_reaches_both_predictions_and_never_the_mask() -> None:
    mask, composite, foreground = random_masks(2, 1, 32, 32), random_masks(2, 1, 16, 16), random_masks(2, 1, 16, 16)
    loss = losses.mask_prediction(mask, composite, foreground)
    target = losses.downsample_mask(mask).detach()
    assert gradient(loss, mask) is None
    # d/dp of half a mean of squares over 512 values: (p - target) / 512.
    torch.testing.assert_close(gradient(loss, composite), (composite.detach() - target) / 512)
    torch.testing.assert_close(gradient(loss, foreground), (foreground.detach() - target) / 512)


def test_mask_consistency_reaches_the_prediction_from_the_composite_alone() -> None:
    foreground, composite = mask_of(0.2, 0.6), mask_of(0.5, 0.6)
    loss = losses.mask_consistency(foreground, composite)
    assert loss.item() == pytest.approx(0.045, rel=1e-5)  # (0.3^2 + 0) / 2
    assert gradient(loss, foreground) is None
    torch.testing.assert_close(gradient(loss, composite), torch.tensor([[[[0.3, 0.0]]]]))


# Coarse and fine mask


def test_binarization_is_the_distance_to_the_nearer_end() -> None:
    mask = mask_of(0.0, 0.2, 0.6, 0.9)
    loss = losses.binarization(mask)
    assert loss.item() == pytest.approx(0.175, rel=1e-5)  # (0 + 0.2 + 0.4 + 0.1) / 4
    torch.testing.assert_close(gradient(loss, mask), torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]]]) / 4)


def test_area_is_the_mean_over_an_image() -> None:
    mask = torch.tensor([[0.0, 1.0], [0.5, 0.3]])[:, None, None]
    torch.testing.assert_close(losses.mask_area(mask), torch.tensor([0.5, 0.4]))


def test_each_image_has_its_own_area_hinge_in_the_aligned_recipe() -> None:
    masks = masks_of_areas(0.25, 0.75)
    loss = losses.area_hinge(losses.mask_area(masks), PHI1)
    assert loss.item() == pytest.approx(0.05, rel=1e-5)  # (0.35 - 0.25 + 0) / 2
    # Only the small mask grows: -1 / (2 images * 4 pixels).
    expected = torch.tensor([-1 / 8, 0.0])[:, None, None, None].expand(2, 1, 2, 2)
    torch.testing.assert_close(gradient(loss, masks), expected)


def test_one_area_hinge_serves_the_batch_in_the_unaligned_recipe() -> None:
    masks = masks_of_areas(0.25, 0.75)  # the mean area of 0.5 is above phi1: nothing fires
    loss = losses.area_hinge(losses.mask_area(masks).mean(), PHI1)
    assert loss.item() == 0.0
    assert not gradient(loss, masks).any()
    masks = masks_of_areas(0.05, 0.45)  # mean 0.25: both grow, the large one too
    loss = losses.area_hinge(losses.mask_area(masks).mean(), PHI1)
    assert loss.item() == pytest.approx(0.1, rel=1e-5)
    torch.testing.assert_close(gradient(loss, masks), torch.full((2, 1, 2, 2), -1 / 8))


def test_fine_area_is_what_clipping_leaves_of_the_fine_mask() -> None:
    coarse, fine = mask_of(0.2, 0.9, 1.0, 0.0), mask_of(0.4, 0.8, 1.0, 0.0)
    mask = combine_masks(coarse, fine, 0.5)
    # c = min(m_c + m_f / 2, 1) - m_c = (0.2, 0.1, 0, 0), mean 0.075.
    loss = losses.fine_area(mask, coarse, PHI2)
    assert loss.item() == pytest.approx(0.065, rel=1e-5)


def test_fine_area_shrinks_the_fine_mask_where_it_counts() -> None:
    coarse, fine = mask_of(0.2, 0.9), mask_of(0.4, 0.8)
    loss = losses.fine_area(combine_masks(coarse, fine, 0.5), coarse, PHI2)
    # First pixel: c = m_f / 2. Second, clipped: c = 1 - m_c. Mean over two pixels.
    torch.testing.assert_close(gradient(loss, fine), torch.tensor([[[[0.25, 0.0]]]]))
    torch.testing.assert_close(gradient(loss, coarse), torch.tensor([[[[0.0, -0.5]]]]))


def test_fine_area_has_a_hinge_for_each_image() -> None:
    coarse = torch.zeros(2, 1, 2, 2)
    mask = masks_of_areas(0.005, 0.05)
    loss = losses.fine_area(mask, coarse, PHI2)
    assert loss.item() == pytest.approx(0.02, rel=1e-4)  # (0 + 0.05 - 0.01) / 2
    assert not gradient(loss, mask)[0].any()


@pytest.mark.parametrize("contribution", [0.0, 0.2, 0.5, 0.98])
def test_equation_9_is_read_as_the_script_does_for_as_printed_it_never_fires(contribution: float) -> None:
    coarse = torch.zeros(1, 1, 4, 4)
    mask = torch.full_like(coarse, contribution)
    inverse_area = 1.0 - contribution  # mean(1 - c)
    printed = max(0.0, PHI2 - inverse_area)
    script = max(0.0, (1.0 - PHI2) - inverse_area)
    assert printed == 0.0
    assert losses.fine_area(mask, coarse, PHI2).item() == pytest.approx(script, abs=1e-6)
    assert (script > 0.0) == (contribution > PHI2)


# Background participation


def _participation_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        (torch.rand(2, 3, 4, 4) * 2 - 1).requires_grad_(),
        (torch.rand(2, 3, 4, 4) * 2 - 1).requires_grad_(),
        random_masks(2, 1, 4, 4),
    )


def test_background_participation_is_the_blend_against_the_background() -> None:
    foreground, background = torch.full((1, 3, 1, 2), 0.5), torch.full((1, 3, 1, 2), -0.5)
    # blend - x_bg = m (x_fg - x_bg) = m: (0.2^2 + 1^2) / 2
    loss = losses.background_participation(foreground, background, mask_of(0.2, 1.0))
    assert loss.item() == pytest.approx(0.52, rel=1e-5)


def test_background_participation_reaches_mask_and_target_but_no_blended_image() -> None:
    foreground, background, mask = _participation_inputs()
    loss = losses.background_participation(foreground, background, mask)
    x_fg, x_bg, m = foreground.detach(), background.detach(), mask.detach()
    error = m * (x_fg - x_bg)  # blend - x_bg
    n = x_fg.numel()
    assert gradient(loss, foreground) is None
    # The target alone: -2 (blend - x_bg) / n. With the blend's x_bg it would be -2 m (blend - x_bg) / n.
    torch.testing.assert_close(gradient(loss, background), -2 * error / n)
    torch.testing.assert_close(gradient(loss, mask), (2 * error * (x_fg - x_bg) / n).sum(dim=1, keepdim=True))


# All


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, p, x: losses.mask_prediction(m, p, p),
        lambda m, p, x: losses.mask_consistency(p, p),
        lambda m, p, x: losses.binarization(m),
        lambda m, p, x: losses.area_hinge(losses.mask_area(m), PHI1),
        lambda m, p, x: losses.fine_area(m, m / 2, PHI2),
        lambda m, p, x: losses.background_participation(x, -x, m),
    ],
    ids=["prediction", "consistency", "binarization", "area", "fine", "participation"],
)
def test_losses_are_means_over_the_batch(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """A batch that holds everything twice costs the same: no loss is a sum."""
    m, p, x = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 16, 16), torch.rand(2, 3, 32, 32)
    once = loss(m, p, x)
    twice = loss(*(t.repeat(2, 1, 1, 1) for t in (m, p, x)))
    assert once.ndim == 0
    torch.testing.assert_close(once, twice)
