"""Registry of the source kinds."""

from collections.abc import Mapping
from types import MappingProxyType

from data_shards.sources.afhq import Afhq
from data_shards.sources.celebamask import CelebaMask
from data_shards.sources.compcars import Compcars
from data_shards.sources.cub import Cub
from data_shards.sources.cutouts import Cutouts
from data_shards.sources.ffhq import Ffhq
from data_shards.sources.folder import Folder
from data_shards.sources.furballs import Furballs
from data_shards.sources.lmdb import Lmdb
from data_shards.sources.shadows import Shadows
from data_shards.sources.source import Source
from data_shards.sources.zip import Zip

KINDS: Mapping[str, type[Source]] = MappingProxyType(
    {
        source.kind: source
        for source in (Folder, Zip, Lmdb, Ffhq, Afhq, Cub, Compcars, CelebaMask, Cutouts, Furballs, Shadows)
    }
)
