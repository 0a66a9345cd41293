"""The networks are those of the papers: equal to a slow reading of them, and sized as published."""

from dataclasses import fields

import pytest
import reference
import torch
from conftest import RESOLUTION, WIDTHS, assert_gradients_agree, gradients, lived_in
from reference import reference_discriminator, reference_generator
from torch import Tensor, nn

from models.discriminator import Discriminator
from models.generator import FurryGenerator, GeneratorOutput
from models.layers import StyledConv
from models.mapping import W_AVERAGE_DECAY, MappingNetwork
from models.masks import combine_masks, composite
from models.widths import Widths

B, HALF = 8, 4
# float32 networks against a float64 reference; images and masks are of unit scale.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
IMAGES = ("foreground", "background", "mask_coarse", "mask_fine", "mask", "composite")


def latents(generator: FurryGenerator, b: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(b, generator.z_dim), torch.randn(b, generator.num_noise)


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


# Sizes


def test_generator_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        at_256, at_64 = FurryGenerator(256), FurryGenerator(64)
    assert count(at_256) == 16_966_306
    assert count(at_256.mapping_foreground, at_256.synthesis_foreground) == 15_194_416
    assert count(at_256.mapping_background, at_256.synthesis_background) == 1_691_760
    assert count(at_256.mask_network_coarse, at_256.mask_network_fine) == 80_130
    assert count(at_64) == 15_577_946


def test_discriminator_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        at_256, at_64 = Discriminator(256), Discriminator(64)
    assert count(at_256) == 29_159_585
    assert count(at_256.mask_predictor) == 295_456
    assert count(at_64) == 26_784_289


def test_config_f_has_512_channels_to_64_px_then_halves() -> None:
    assert [Widths()(r) for r in (4, 16, 32, 64, 128, 256, 512)] == [512, 512, 512, 512, 256, 128, 64]


# Generator


@pytest.mark.parametrize(("fade_in", "num_composites"), [(0.0, None), (0.4, HALF), (1.0, 1)])
def test_generator_equals_the_slow_reference(
    generator: FurryGenerator, fade_in: float, num_composites: int | None
) -> None:
    z, noise = latents(generator)
    out = generator(z, noise=noise, fade_in=fade_in, num_composites=num_composites)
    expected = reference_generator(generator, z.double(), noise.double(), fade_in, num_composites)
    for name in IMAGES:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name).float(), **TOLERANCE)


def test_generator_gradients_equal_those_of_the_slow_reference(generator: FurryGenerator) -> None:
    z, noise = latents(generator)

    def loss(out: GeneratorOutput | reference.ReferenceImages) -> Tensor:
        torch.manual_seed(1)
        images = [getattr(out, name) for name in IMAGES]
        return torch.stack([(i * torch.randn(i.shape)).mean() for i in images]).sum()

    actual = gradients(loss(generator(z, noise=noise, fade_in=0.4, num_composites=HALF)), generator)
    slow = loss(reference_generator(generator, z.double(), noise.double(), 0.4, HALF))
    assert_gradients_agree(actual, gradients(slow, generator))


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_networks_run_at_each_resolution(resolution: int) -> None:
    generator, discriminator = FurryGenerator(resolution, WIDTHS), Discriminator(resolution, WIDTHS)
    out = generator(torch.randn(4, 384), num_composites=2)
    assert out.foreground.shape == (4, 3, resolution, resolution)
    assert out.mask.shape == (4, 1, resolution, resolution)
    assert out.composite.shape == out.background.shape == (2, 3, resolution, resolution)
    judged = discriminator(out.foreground)
    assert judged.logits.shape == (4, 1)
    assert judged.mask_pred.shape == (4, 1, 16, 16)
    for f in fields(out):
        assert getattr(out, f.name).isfinite().all(), f.name


def test_images_and_masks_keep_their_bounds(generator: FurryGenerator) -> None:
    out = generator(torch.randn(B, 384))
    for image in (out.foreground, out.background, out.composite):
        assert image.abs().max() <= 1.0
    for mask in (out.mask_coarse, out.mask_fine):
        assert (mask.amin(dim=(1, 2, 3)) == 0.0).all()
        assert (mask.amax(dim=(1, 2, 3)) > 1.0 - 1e-5).all()
        assert mask.max() <= 1.0
    assert out.mask.min() >= 0.0
    assert out.mask.max() <= 1.0


def test_mask_is_coarse_plus_faded_fine_clipped(generator: FurryGenerator) -> None:
    coarse, fine = torch.tensor([0.0, 0.2, 0.9, 1.0]), torch.tensor([0.4, 0.0, 0.6, 1.0])
    torch.testing.assert_close(combine_masks(coarse, fine, 0.5), torch.tensor([0.2, 0.2, 1.0, 1.0]))
    out = generator(torch.randn(2, 384), fade_in=0.0)
    assert torch.equal(out.mask, out.mask_coarse)


def test_composite_shows_foreground_where_the_mask_is_one() -> None:
    foreground, background = torch.tensor([0.8, 0.8, 0.8]), torch.tensor([-0.4, -0.4, -0.4])
    blend = composite(foreground, background, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(blend, torch.tensor([-0.4, -0.1, 0.8]))  # 0.25 * 0.8 + 0.75 * -0.4 = -0.1


def test_num_composites_changes_nothing_but_how_many(generator: FurryGenerator) -> None:
    z, noise = latents(generator)
    whole, half = generator(z, noise=noise), generator(z, noise=noise, num_composites=HALF)
    torch.testing.assert_close(half.foreground, whole.foreground)
    torch.testing.assert_close(half.mask, whole.mask)
    for name in ("background", "composite", "w_background"):
        assert len(getattr(half, name)) == HALF
        torch.testing.assert_close(getattr(half, name), getattr(whole, name)[:HALF], rtol=1e-4, atol=1e-4)


def test_background_sees_only_the_front_of_z(generator: FurryGenerator) -> None:
    z, noise = latents(generator)
    before = generator(z, noise=noise)
    z_back, z_front = z.clone(), z.clone()
    z_back[:, 128:] = torch.randn(B, 256)
    z_front[:, :128] = torch.randn(B, 128)
    after_back, after_front = generator(z_back, noise=noise), generator(z_front, noise=noise)
    assert torch.equal(after_back.background, before.background)
    assert not torch.allclose(after_back.foreground, before.foreground, atol=1e-2)
    assert not torch.allclose(after_front.background, before.background, atol=1e-2)


def test_foreground_and_background_share_no_parameter(generator: FurryGenerator) -> None:
    foreground = {p.data_ptr() for n, p in generator.named_parameters() if "background" not in n}
    background = {p.data_ptr() for n, p in generator.named_parameters() if "background" in n}
    assert len(background) > 0
    assert not foreground & background
    assert len(foreground | background) == len(list(generator.parameters()))


def test_noise_has_no_effect_at_the_start_and_one_later() -> None:
    fresh = FurryGenerator(RESOLUTION, WIDTHS)
    z = torch.randn(2, 384)
    assert torch.equal(fresh(z).composite, fresh(z).composite)
    lived_in(fresh)
    assert not torch.allclose(fresh(z).composite, fresh(z).composite, atol=1e-3)


def test_noise_is_one_value_a_pixel_and_sample() -> None:
    layer = StyledConv(3, 4, 1, 5)
    nn.init.zeros_(layer.conv.weight)
    nn.init.constant_(layer.noise_strength, 0.5)
    noise = torch.rand(2, 1, 6, 6)  # not negative: leaky ReLU is the identity but for its gain
    y = layer(torch.randn(2, 3, 6, 6), torch.randn(2, 5), noise)
    torch.testing.assert_close(y, (0.5 * 2**0.5 * noise).expand(2, 4, 6, 6))


def test_samples_of_a_batch_do_not_see_one_another(generator: FurryGenerator) -> None:
    z, noise = latents(generator)
    whole, alone = generator(z, noise=noise), generator(z[2:3], noise=noise[2:3])
    for name in IMAGES:
        torch.testing.assert_close(getattr(alone, name), getattr(whole, name)[2:3], rtol=1e-4, atol=1e-5)


# Mapping and truncation


def test_w_starts_at_unit_scale() -> None:
    w = MappingNetwork(384)(torch.randn(256, 384))
    assert 0.7 < w.square().mean().item() < 1.5


def test_mapping_sees_only_the_direction_of_z() -> None:
    mapping, z = MappingNetwork(16), torch.randn(4, 16)
    torch.testing.assert_close(mapping(z), mapping(3.0 * z), rtol=1e-4, atol=1e-5)


def test_no_psi_gives_every_sample_the_truncation_centre(generator: FurryGenerator) -> None:
    for mapping in (generator.mapping_foreground, generator.mapping_background):
        mapping.w_average.normal_()
    z, noise = latents(generator)
    out = generator(z, noise=noise[:1].expand(B, -1), psi=0.0)
    assert torch.equal(out.w_foreground, generator.mapping_foreground.w_average.expand(B, -1))
    assert torch.equal(out.w_background, generator.mapping_background.w_average.expand(B, -1))
    torch.testing.assert_close(out.composite, out.composite[:1].expand_as(out.composite))


def test_psi_interpolates_from_the_centre_to_w(generator: FurryGenerator) -> None:
    mapping = generator.mapping_foreground
    mapping.w_average.normal_()
    z = torch.randn(B, 384)
    w = mapping(z)
    torch.testing.assert_close(mapping(z, 0.7), mapping.w_average + 0.7 * (w - mapping.w_average))


def test_truncation_centre_is_a_saved_buffer_that_whole_batches_move() -> None:
    mapping = MappingNetwork(16)
    assert "w_average" in dict(mapping.named_buffers())
    assert "w_average" not in dict(mapping.named_parameters())
    first, second = torch.randn(16), torch.randn(16)
    mapping.update_average(first)
    mapping.update_average(second)
    keep = W_AVERAGE_DECAY
    expected = keep * (1 - keep) * first + (1 - keep) * second
    torch.testing.assert_close(mapping.w_average, expected)
    restored = MappingNetwork(16)
    restored.load_state_dict(mapping.state_dict())
    assert torch.equal(restored.w_average, mapping.w_average)


def test_forward_leaves_the_truncation_centre_alone(generator: FurryGenerator) -> None:
    generator(torch.randn(2, 384))
    assert not generator.mapping_foreground.w_average.any()


# Discriminator


@pytest.mark.parametrize("judged", [None, (B,), (B, B), (HALF, B), (B, HALF, HALF)])
def test_discriminator_equals_the_slow_reference(discriminator: Discriminator, judged: tuple[int, ...] | None) -> None:
    images = torch.rand(2 * B + HALF, 3, RESOLUTION, RESOLUTION) * 2.0 - 1.0
    out = discriminator(images, judged=judged)
    expected = reference_discriminator(discriminator, images.double(), judged)
    torch.testing.assert_close(out.logits, expected.logits.float(), **TOLERANCE)
    torch.testing.assert_close(out.mask_pred, expected.mask_pred.float(), **TOLERANCE)


def test_discriminator_gradients_equal_those_of_the_slow_reference(discriminator: Discriminator) -> None:
    images = torch.rand(B, 3, RESOLUTION, RESOLUTION) * 2.0 - 1.0
    mask_weights = torch.randn(B, 1, 16, 16)

    def loss(logits: Tensor, mask_pred: Tensor) -> Tensor:
        return logits.square().mean() + (mask_pred * mask_weights).mean()

    out, slow = discriminator(images), reference_discriminator(discriminator, images.double())
    actual = gradients(loss(out.logits, out.mask_pred), discriminator)
    assert_gradients_agree(actual, gradients(loss(slow.logits, slow.mask_pred), discriminator))


def test_minibatches_in_one_pass_are_judged_as_if_apart(discriminator: Discriminator) -> None:
    real = torch.rand(B, 3, RESOLUTION, RESOLUTION)
    fake = -torch.rand(B, 3, RESOLUTION, RESOLUTION)
    together = discriminator(torch.cat([real, fake]), judged=(B, B)).logits
    apart = torch.cat([discriminator(real).logits, discriminator(fake).logits])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    mixed = discriminator(torch.cat([real, fake])).logits
    assert not torch.allclose(mixed, apart, atol=1e-3)


def test_images_that_are_not_judged_change_no_logit(discriminator: Discriminator) -> None:
    images = torch.rand(B + HALF, 3, RESOLUTION, RESOLUTION)
    out = discriminator(images, judged=(B,))
    assert out.logits.shape == (B, 1)
    assert out.mask_pred.shape == (B + HALF, 1, 16, 16)
    torch.testing.assert_close(out.logits, discriminator(images[:B]).logits, rtol=1e-5, atol=1e-5)


def test_predict_mask_equals_the_mask_of_the_whole_pass(discriminator: Discriminator) -> None:
    images = torch.rand(B, 3, RESOLUTION, RESOLUTION)
    torch.testing.assert_close(discriminator.predict_mask(images), discriminator(images).mask_pred)


def test_mask_predictor_needs_nothing_below_16_px(discriminator: Discriminator) -> None:
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION)
    before = discriminator.predict_mask(images)
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            if name.startswith(("blocks_to_logits", "final")):
                parameter.fill_(float("nan"))
    assert torch.equal(discriminator.predict_mask(images), before)


# Mixed precision


def test_bfloat16_stays_finite_and_near_float32(generator: FurryGenerator, discriminator: Discriminator) -> None:
    z, noise = latents(generator)
    exact = generator(z, noise=noise)
    exact_judged = discriminator(exact.composite)
    with torch.autocast("cpu", torch.bfloat16):
        out = generator(z, noise=noise)
        judged = discriminator(out.composite)
        loss = judged.logits.mean() + judged.mask_pred.mean() + out.mask.mean()
    for mask in (out.mask_coarse, out.mask_fine, out.mask, judged.mask_pred):
        assert mask.dtype == torch.float32
    for name in IMAGES:
        # bfloat16 has 8 bits: 0.4% a rounding, some twenty of them in a row.
        difference = getattr(out, name) - getattr(exact, name)
        assert difference.square().mean().sqrt() < 0.03, name
    assert (judged.logits.float() - exact_judged.logits).abs().max() < 0.05
    assert (judged.mask_pred - exact_judged.mask_pred).square().mean().sqrt() < 0.03
    loss.backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_bfloat16_allows_truncation(generator: FurryGenerator) -> None:
    z, noise = latents(generator, 2)
    exact = generator(z, noise=noise, psi=0.7)
    with torch.autocast("cpu", torch.bfloat16):
        out = generator(z, noise=noise, psi=0.7)
    assert (out.composite - exact.composite).square().mean().sqrt() < 0.03
