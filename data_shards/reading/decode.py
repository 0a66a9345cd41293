"""Decode an image with Pillow and return its pixels without a copy, so that threads can decode at the same time.

Pillow releases Python's lock while it decodes, but ``np.asarray(image)`` copies the pixels while it holds the lock,
which takes longer than anything else that an image needs the lock for. So NumPy reads Pillow's own memory, which Pillow
exports by Arrow's C data interface (https://arrow.apache.org/docs/format/CDataInterface.html).
"""

import ctypes
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def decode(content: bytes, mode: str) -> NDArray[np.uint8]:
    """The pixels of an encoded image, ``[C, H, W]``, read-only.

    Args:
        content: PNG, JPEG, WebP or any other format that Pillow reads.
        mode: ``"RGB"`` or ``"L"``.

    Raises:
        OSError, SyntaxError, ValueError: Pillow cannot decode it.
    """
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        converted = image if image.mode == mode else image.convert(mode)
    try:
        pixels = np.asarray(_PillowMemory(converted))
    except _InPiecesError:
        pixels = np.atleast_3d(np.asarray(converted))
    return pixels[..., : len(mode)].transpose(2, 0, 1)


class _InPiecesError(Exception):
    """The image has more than 16 MiB, which Pillow keeps in several pieces."""


class _ArrowArray(ctypes.Structure):
    """The first fields of the interface's array; their layout never changes."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]

_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _PillowMemory:
    """The memory of an 8-bit image, ``[H, W, bytes of a pixel]``, for NumPy, whose array keeps this object alive.

    A pixel of mode RGB has a fourth byte.

    Raises:
        _InPiecesError: the image is not in one piece.
    """

    def __init__(self, image: Image.Image) -> None:
        try:
            self._capsules = image.__arrow_c_array__()  # they keep the memory alive
        except ValueError:
            raise _InPiecesError from None
        pixels = _ArrowArray.from_address(_capsule_pointer(self._capsules[1], b"arrow_array"))
        if pixels.n_children:  # a list of bytes for each pixel
            pixels = pixels.children[0].contents
        shape = image.height, image.width, pixels.length // (image.height * image.width)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": (pixels.buffers[1], True)}
