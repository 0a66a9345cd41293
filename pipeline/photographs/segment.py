"""Segmentation of photographs in one forward pass of the distilled network."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from data_shards.progress import progress_bar
from pipeline.generation.cutouts import to_uint8_alpha
from pipeline.photographs.distillation.network import load_network
from pipeline.photographs.photos import (
    check_outputs_new,
    cut_out,
    find_photos,
    matte,
    output_path,
    read_photo,
    save_png,
    to_tensor,
)
from pipeline.runs.reproducible import make_repeatable, this_device


@dataclass(frozen=True)
class Segment:
    """Alpha and cut-out of each photo at its own size, in one forward pass of the network of distill.py."""

    photos: tyro.conf.Positional[tuple[Path, ...]]
    """Photos, or folders of them."""
    run: Path
    """Run directory; its distilled/network.pt is used."""
    network: Path | None = None
    """Another network.pt of distill.py."""
    out: Path = Path("segmented")
    """Folder for NAME-alpha.png and NAME-cutout.png."""
    num_threads: int = 0
    """CPU threads; 0 is all cores."""

    def __call__(self) -> None:
        """Segment all photos."""
        make_repeatable(self.num_threads)
        photos = find_photos(self.photos)
        check_outputs_new(photos, self.out, ("alpha", "cutout"))
        device = this_device()
        network = load_network(self.network or self.run / "distilled" / "network.pt", device)
        for photo in progress_bar(photos, desc="segmenting", unit="photo"):
            image = read_photo(photo)
            alpha = matte(network, to_tensor(image, device), resolution=network.resolution, stride=network.stride)
            pixels = to_uint8_alpha(alpha)[0]
            save_png(pixels, output_path(self.out, photo, "alpha"))
            save_png(cut_out(image, pixels), output_path(self.out, photo, "cutout"))
        print(f"{self.out}: alpha and cut-out of {len(photos)} photo{'s' * (len(photos) > 1)}")
