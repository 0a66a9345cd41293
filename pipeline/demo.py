"""Try a trained run in a browser: the parts of its images, and your own photographs cut out.

python pipeline/demo.py --run runs/mine
"""

import contextlib
import importlib.util
import os
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from data_shards.command import parse_options, run_command

from data_shards.errors import UserError
from pipeline.generation.trained_run import open_run
from pipeline.pages.demonstration.photograph import choose_matting
from pipeline.pages.serving import check_port, listen, url_of
from pipeline.runs.reproducible import make_repeatable, this_device

# Nothing is asked of other machines: neither by the page nor, on behalf of Gradio, by this process, which would even
# ask itself through a proxy.
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "NO_PROXY": "*", "no_proxy": "*"}


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    run: Path
    """Run directory; it stays as it is."""
    checkpoint: str = "best"
    """best, latest, or a checkpoint file."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines and phones in."""
    port: int = 8322
    """Port to listen on; 0 for any that is free."""
    num_threads: int = 0
    """CPU threads; 0 is all cores."""

    def __post_init__(self) -> None:
        check_port(self.port)


def main() -> None:
    """Answer browsers until interrupted."""
    arguments: Arguments = parse_options(Arguments, __doc__)
    check_installed()
    make_repeatable(arguments.num_threads)
    device = this_device()
    run = open_run(arguments.run, arguments.checkpoint, device)
    matting = choose_matting(run, device)
    with tempfile.TemporaryDirectory(prefix="furrygan-demo-") as folder, contextlib.suppress(KeyboardInterrupt):
        with contextlib.closing(listen(arguments.host, arguments.port)) as listening:
            port, url = listening.getsockname()[1], url_of(listening)
            # SIGINT too: a shell that starts us in the background has it ignored. Unheard, either leaves the folder.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            os.environ |= ENVIRONMENT | {"GRADIO_TEMP_DIR": folder}
            from pipeline.pages.demonstration.page import launch, make_page

            page = make_page(run, matting, Path(folder))
        try:
            launch(page, arguments.host, port)
            print(f"open {url}  (Ctrl-C ends)", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def check_installed() -> None:
    """Whether Gradio is there, without the seconds that its import takes.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "the page needs the package gradio: pip install 'furrygan-pipeline[demo]', or uv sync --extra demo"
        )


if __name__ == "__main__":
    run_command(main)
