"""CelebAMask-HQ."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from PIL import ImageChops

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, Picture, read_mask, read_picture
from data_shards.sources.source import Source, existing_folder

PARTS = (
    *("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
    *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
"""All parts that CelebAMask-HQ knows: what is none of them is background."""

_PICTURES, _MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
_PER_FOLDER = 2000


@dataclass(frozen=True, kw_only=True)
class CelebaMask(Source):
    """CelebAMask-HQ: 30,000 faces of 1024 px; the alpha is the union of their part masks, which are of 512 px.

    SOURCE/CelebA-HQ-img/0.jpg ... 29999.jpg, SOURCE/CelebAMask-HQ-mask-anno/0/00000_skin.png ... 14/29999_hair.png
    """

    kind = "celebamask"

    source: Path
    """The folder CelebAMask-HQ."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: ``17.jpg``, by number."""
        remedy = f"give the folder CelebAMask-HQ, which holds {_PICTURES} and {_MASKS}"
        existing_folder(self.source / _MASKS, remedy)
        folder = existing_folder(self.source / _PICTURES, remedy)
        numbers = sorted(int(path.stem) for path in folder.glob("*.jpg") if path.stem.isdecimal())
        if not numbers:
            raise UserError(f"{folder} holds no images named 0.jpg to 29999.jpg; {remedy}")
        return [f"{number}.jpg" for number in numbers]

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        number = int(Path(reference).stem)
        folder = self.source / _MASKS / str(number // _PER_FOLDER)
        masks = [path for part in PARTS if (path := folder / f"{number:05d}_{part}.png").is_file()]
        if not masks:
            raise BrokenPictureError("it has no part masks")
        picture = read_picture(self.source / _PICTURES / reference)
        return replace(picture, alpha=reduce(ImageChops.lighter, map(read_mask, masks)))
