"""Registry of the output kinds."""

from collections.abc import Mapping

from pipeline.generation.cutouts import Cutouts
from pipeline.generation.dataset import Dataset
from pipeline.generation.grid import Grid
from pipeline.generation.interpolate import Interpolate
from pipeline.generation.kind import Kind
from pipeline.generation.masks import Masks
from pipeline.generation.mix import Mix
from pipeline.generation.swap import Swap

KINDS: Mapping[str, type[Kind]] = {kind.name: kind for kind in (Grid, Cutouts, Dataset, Swap, Interpolate, Mix, Masks)}
