"""The images that are measured: generated ones by sample number, real ones by their index in the shard set."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_shards.errors import UserError
from data_shards.reading.batches import check_size
from data_shards.reading.shard_set import ShardSet
from models.generator import GeneratorOutput
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.randomness import Stream, draw


@torch.no_grad()
def generate(run: TrainedRun, samples: Sequence[int], *, psi: float, seed: int) -> GeneratorOutput:
    """Samples by their numbers, each a function of (checkpoint, seed, number, psi) up to rounding.

    Args:
        run: whose average generator draws.
        samples: their numbers.
        psi: truncation.
        seed: of latents and noise.
    """
    generator = run.generator
    device = next(generator.parameters()).device
    given = draw(
        seed, Stream.EVALUATION, 0, samples, z_dim=generator.z_dim, num_noise=generator.num_noise, device=device
    )
    out: GeneratorOutput = generator(given.z, noise=given.noise, fade_in=run.fade_in, psi=psi)
    return out


def to_uint8(images: Tensor) -> Tensor:
    """``[b, 3, H, W]`` in [-1, 1] as uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


class RealPictures:
    """Images of a shard set, as they are: in order, never mirrored.

    Args:
        shard_set: stays the caller's to close.
        num_threads: that decode.
    """

    def __init__(self, shard_set: ShardSet, *, num_threads: int) -> None:
        self._shard_set = shard_set
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def images(self, samples: Sequence[int]) -> Tensor:
        """``[b, 3, R, R]`` uint8."""
        contents = [self._shard_set.image_bytes(sample) for sample in samples]
        decoded = list(self._pool.map(partial(self._decode, mode="RGB"), samples, contents))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    def alphas(self, samples: Sequence[int]) -> Tensor:
        """Ground-truth alpha ``[b, 1, R, R]`` in [0, 1]."""
        contents = [self._shard_set.alpha_bytes(sample) for sample in samples]
        decoded = list(self._pool.map(partial(self._decode, mode="L"), samples, contents))
        return torch.from_numpy(np.stack(decoded))[:, None].float() / 255.0

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _decode(self, sample: int, content: bytes, *, mode: str) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.asarray(image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"{self._shard_set.location(sample)} cannot be decoded ({error}); rebuild the set"
            ) from None
        check_size(self._shard_set, sample, *pixels.shape[:2])
        return pixels
