"""The Gradio page of the demonstration: its elements and the functions behind them."""

import html
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_shards.command import memory_errors

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from starlette.middleware import Middleware

from data_shards.errors import UserError
from models.discriminator import MASK_RESOLUTION
from pipeline.generation.cutouts import to_rgba, to_uint8_alpha
from pipeline.generation.sample_grid import to_uint8_pictures
from pipeline.generation.trained_run import TrainedRun
from pipeline.pages.demonstration.photograph import MAX_PIXELS, Matting, read_upload, segment
from pipeline.pages.demonstration.sample import MAX_FADE_IN, Choices, make_sample
from pipeline.pages.serving import AddHeaders
from pipeline.photographs.photos import output_path, save_png

EXTENSIONS = [".jpg", ".jpeg", ".png", ".webp"]
"""What browsers show too."""

# Fonts of the viewer's own machine: those of Gradio's themes may come from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
)

CSS = """
.samples { display: grid; grid-template-columns: repeat(3, 1fr); }
.image-container:has(img) { padding-top: 32px; }
.samples :is(button, .image-frame):has(img), .samples img {
    width: 100%; object-fit: contain; image-rendering: pixelated;
}
.cutout img { background: repeating-conic-gradient(#cccccc 0 25%, #f2f2f2 0 50%) 0 0 / 24px 24px; }
@media (max-width: 640px) {
    .samples { grid-template-columns: repeat(2, 1fr); }
    .samples label span { display: none; }
}
"""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MAX_UPLOAD = "64mb"
DELETE = (600, 3600)
"""So often, in seconds, what is older than so many seconds goes, of what was sent and what was made."""

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def make_page(run: TrainedRun, matting: Matting | None, folder: Path) -> gr.Blocks:
    """The page, ready to be launched.

    Args:
        run: whose generator it shows.
        matting: of photographs; None where the run has no way to alpha.
        folder: for files that the browser gets.
    """
    with gr.Blocks(title=f"FurryGAN: {_name(run)}", analytics_enabled=False, delete_cache=DELETE) as page:
        gr.Markdown(
            f"# FurryGAN\n`{_name(run)}`: {run.config.dataset}, {run.config.resolution} px, "
            f"{run.images_seen:,} images seen"
        )
        with gr.Tab("Generate"):
            _generate_part(page, run, folder)
        with gr.Tab("Your photograph"):
            _photograph_part(run, matting, folder)
    return page.queue()


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page from a thread of its own.

    Raises:
        UserError: the port has been taken in the meantime.
    """
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size=MAX_UPLOAD,
            theme=THEME,
            css=CSS,
            app_kwargs={"middleware": [Middleware(AddHeaders, headers=HEADERS)]},
        )
    except OSError:
        raise UserError(f"--port {port} has just been taken; choose another") from None


def _generate_part(page: gr.Blocks, run: TrainedRun, folder: Path) -> None:
    has_fine = run.generator.mask_network_fine is not None
    with gr.Row():
        with gr.Column(scale=3, min_width=320), gr.Row(elem_classes="samples"):
            composite, cutout, mask = _picture("Composite"), _picture("Cut-out", "cutout"), _picture("Mask")
            foreground, background = _picture("Foreground"), _picture("Background")
            mask_coarse = _picture("Coarse mask")
        with gr.Column(scale=1, min_width=280):
            seed = gr.Number(0, label="Seed", precision=0)
            following = gr.Button("Next seed")
            psi = gr.Slider(0, 1, 1, step=0.05, label="Truncation psi", info="Less: typical images, and all alike")
            swapped = gr.Checkbox(False, label="On another background")
            background_seed = gr.Number(100, label="Seed of the background", precision=0)
            fade_in = gr.Slider(
                0,
                MAX_FADE_IN,
                run.fade_in,
                step=0.05,
                interactive=has_fine,
                label="Fine mask, gamma of Eq. 3",
                info="0: the coarse mask alone; 1: as trained" if has_fine else "This run has no fine mask",
            )
            hardness = gr.Slider(0, 1, 0, step=0.05, label="Hardness of the alpha", info="0: as made; 1: no soft edges")
            threshold = gr.Slider(0, 1, 0.5, step=0.05, label="Threshold", info="About which the alpha is hardened")
    choices = [seed, psi, swapped, background_seed, fade_in, threshold, hardness]

    def generate(
        seed: int, psi: float, swapped: bool, background_seed: int, fade_in: float, threshold: float, hardness: float
    ) -> list[str]:
        with errors_on_the_page(5):
            if seed is None or background_seed is None:
                raise UserError("a seed is empty: give 0 or more")
            wanted = Choices(seed, psi, background_seed if swapped else None, fade_in, threshold, hardness)
            output = make_sample(run, wanted)
        pictures = {
            "composite": to_uint8_pictures(output.composite)[0],
            "cutout": to_rgba(output.foreground, output.mask)[0],
            "mask": to_uint8_alpha(output.mask)[0],
            "foreground": to_uint8_pictures(output.foreground)[0],
            "background": to_uint8_pictures(output.background)[0],
            "coarse": to_uint8_alpha(output.mask_coarse)[0],
        }
        return _save(pictures, folder, f"seed{seed}")

    gr.on(
        [page.load, *(choice.change for choice in choices)],
        generate,
        choices,
        [composite, cutout, mask, foreground, background, mask_coarse],
        trigger_mode="always_last",
        show_progress="hidden",
        api_name="generate",
        **ONE_AT_A_TIME,
    )
    following.click(lambda seed: ((seed or 0) + 1) % 2**32, seed, seed, api_visibility="private")


def _photograph_part(run: TrainedRun, matting: Matting | None, folder: Path) -> None:
    remedy = f"`python pipeline/distill.py --run {run.run_dir}`"
    if matting is None:
        gr.Markdown(f"This run has no network for photographs; {remedy} makes one.")
        return
    if matting.is_distilled:
        gr.Markdown("By the network that was distilled from this run.")
    else:
        gr.Markdown(
            f"By the discriminator's mask predictor, {MASK_RESOLUTION} squares across and enlarged: only a rough idea. "
            f"{remedy} makes a network that does better."
        )
    given = gr.File(
        file_types=EXTENSIONS,
        height=140,
        label=f"JPEG, PNG or WebP of up to {MAX_PIXELS / 1e6:g} million pixels",
    )
    with gr.Row():
        photo, alpha, cutout = _picture("Photograph"), _picture("Alpha"), _picture("Cut-out", "cutout")

    def cut(given: str | None) -> list[str] | list[None]:
        if given is None:
            return [None, None, None]
        with errors_on_the_page(None):
            alpha, cutout = segment(matting, read_upload(Path(given)))
        return [given, *_save({"alpha": alpha, "cutout": cutout}, folder, given)]

    # First of all the old images go: they must not stand below the name of a file that failed, or takes its time.
    shown = [photo, alpha, cutout]
    given.change(lambda: [None] * len(shown), None, shown, queue=False, api_visibility="private").then(
        cut, given, shown, show_progress_on=cutout, api_name="segment", **ONE_AT_A_TIME
    )


def _save(pictures: Mapping[str, NDArray[np.uint8]], folder: Path, name: str) -> list[str]:
    """Files, by the names under which they are downloaded."""
    out = Path(tempfile.mkdtemp(dir=folder))
    files = [output_path(out, Path(name), kind) for kind in pictures]
    for file, pixels in zip(files, pictures.values(), strict=True):
        save_png(pixels, file)
    return [str(file) for file in files]


def _picture(label: str, *classes: str) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=label,
        min_width=260,
        elem_classes=list(classes),
        format="png",
        image_mode=None,
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def _name(run: TrainedRun) -> str:
    return run.run_dir.resolve().name


@contextmanager
def errors_on_the_page(duration_s: float | None) -> Iterator[None]:
    """What is the viewer's mistake is said to them, and not to the terminal. Gradio shows it as HTML.

    Args:
        duration_s: that it stands there; None: until it is closed.
    """
    try:
        with memory_errors("end other programs, or choose a smaller photograph"):
            yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), duration=duration_s, print_exception=False) from None
