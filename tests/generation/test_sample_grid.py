"""Sample grids: a row for each kind of image, a column for each latent, a label for each row."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models.generator import FurryGenerator, GeneratorOutput
from pipeline.generation.sample_grid import (
    CELL,
    GAP,
    MARGIN,
    PAPER,
    PSIS,
    ROWS,
    beside,
    checkerboard,
    draw_grid,
    draw_panel,
    sample_column,
)

COLUMNS = 3
PITCH = CELL + MARGIN


@pytest.fixture
def grid(generator: FurryGenerator) -> Image.Image:
    return make(generator)


def make(generator: FurryGenerator, psis: tuple[float, ...] = PSIS, columns: int = COLUMNS) -> Image.Image:
    torch.manual_seed(0)
    z, noise = torch.randn(columns, generator.z_dim), torch.randn(columns, generator.num_noise)
    return sample_grid(generator, z, noise, fade_in=1.0, psis=psis)


def sample_grid(
    generator: FurryGenerator, z: torch.Tensor, noise: torch.Tensor, *, fade_in: float, psis: tuple[float, ...] = PSIS
) -> Image.Image:
    latents = zip(z.split(1), noise.split(1), strict=True)
    return draw_grid([sample_column(generator, *latent, fade_in=fade_in, psis=psis) for latent in latents], psis=psis)


def cells(grid: Image.Image, panel: int, num_panels: int = 2) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Row, column and pixels of each cell of a panel; they fill its lower right corner."""
    height = grid.height // num_panels
    for row in range(len(ROWS)):
        for column in range(COLUMNS):
            right, bottom = (COLUMNS - column) * PITCH, (len(ROWS) - row) * PITCH
            x, y = grid.width - right, (panel + 1) * height - bottom
            yield row, column, np.asarray(grid.crop((x, y, x + CELL, y + CELL)))


def test_a_grid_has_a_panel_for_each_psi_a_row_for_each_kind_and_a_column_for_each_latent(
    generator: FurryGenerator, grid: Image.Image
) -> None:
    assert len(ROWS) == 7
    left = grid.width - COLUMNS * PITCH
    top = grid.height // 2 - len(ROWS) * PITCH
    assert 0 < left < 200 and 0 < top < 60
    assert make(generator, psis=(1.0,)).size == (grid.width, grid.height // 2)
    assert make(generator, columns=COLUMNS + 2).size == (grid.width + 2 * PITCH, grid.height)


def test_every_row_has_a_label_on_its_left(grid: Image.Image) -> None:
    pixels, left = np.asarray(grid.convert("L")), grid.width - COLUMNS * PITCH
    for panel in range(2):
        bottom = (panel + 1) * grid.height // 2
        labels = []
        for row in range(len(ROWS)):
            y = bottom - (len(ROWS) - row) * PITCH
            label = pixels[y : y + CELL, :left] < 128
            assert 20 < label.sum() < label.size / 4, ROWS[row]
            assert not label[:, -MARGIN:].any()  # it does not touch the images
            labels.append(label)
        assert all(not np.array_equal(a, b) for i, a in enumerate(labels) for b in labels[:i])
        assert (pixels[bottom - grid.height // 2 : bottom - len(ROWS) * PITCH, left:] < 128).any()  # psi


def test_cells_show_what_the_generator_made(generator: FurryGenerator, grid: Image.Image) -> None:
    torch.manual_seed(0)
    z, noise = torch.randn(COLUMNS, generator.z_dim), torch.randn(COLUMNS, generator.num_noise)
    for panel, psi in enumerate((1.0, 0.7)):
        with torch.no_grad():
            out = generator(z, noise=noise, fade_in=1.0, psi=psi)
        expected = expected_rows(out)
        for row, column, pixels in cells(grid, panel):
            picture = expected[row][column].expand(3, -1, -1).permute(1, 2, 0).numpy()
            shown = pixels[1::3, 1::3].astype(float)  # 32 px, each enlarged threefold
            np.testing.assert_allclose(shown, picture * 255, atol=1.01, err_msg=f"{ROWS[row]}, psi {psi}")


def expected_rows(out: GeneratorOutput) -> list[torch.Tensor]:
    """In [0, 1]."""
    mask, board = out.mask, (checkerboard(32) + 1) / 2
    foreground, background, composite = ((x + 1) / 2 for x in (out.foreground, out.background, out.composite))
    cut_out = mask * foreground + (1 - mask) * board
    return [foreground, out.mask_coarse, mask - out.mask_coarse, mask, cut_out, background, composite]


def test_larger_pictures_are_not_reduced() -> None:
    rows = [np.zeros((2, 128, 128, 3), dtype=np.uint8)] * len(ROWS)
    panel = draw_panel(rows, ROWS, title="psi = 1")
    assert panel.height > len(ROWS) * 128 and panel.width > 2 * 128


def test_panels_beside_each_other_have_paper_between_them_and_none_around() -> None:
    sizes = [(40, 30), (20, 50), (10, 30)]
    picture = np.asarray(beside([Image.new("RGB", size, (0, 0, 99)) for size in sizes]))
    assert GAP > MARGIN
    expected = np.full((50, 40 + GAP + 20 + GAP + 10, 3), PAPER)
    x = 0
    for width, height in sizes:
        expected[:height, x : x + width] = (0, 0, 99)
        x += width + GAP
    assert np.array_equal(picture, expected)


def test_ground_of_the_grid_is_paper(grid: Image.Image) -> None:
    assert grid.getpixel((0, 0)) == PAPER
    assert grid.mode == "RGB"


def test_drawing_a_grid_draws_no_random_numbers_and_moves_no_weight(generator: FurryGenerator) -> None:
    weights = {name: value.clone() for name, value in generator.state_dict().items()}
    z, noise = torch.randn(2, generator.z_dim), torch.randn(2, generator.num_noise)
    before = torch.get_rng_state()
    first = sample_grid(generator, z, noise, fade_in=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in generator.state_dict().items())
    assert first.tobytes() == sample_grid(generator, z, noise, fade_in=0.5).tobytes()


@pytest.mark.parametrize("resolution", [32, 64, 256])
def test_checkerboard_alternates_two_greys(resolution: int) -> None:
    board = checkerboard(resolution)
    assert board.shape == (1, 1, resolution, resolution)
    squares = board[0, 0].reshape(8, resolution // 8, 8, resolution // 8).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(squares.amin(-1), squares.amax(-1))  # each square has one grey
    assert len(board.unique()) == 2 and board.min() >= -1 and board.max() <= 1
    greys = squares[..., 0]
    assert (greys[1:] != greys[:-1]).all() and (greys[:, 1:] != greys[:, :-1]).all()
