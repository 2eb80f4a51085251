"""Files in MNIST's format, written by hand from its description."""

import gzip
import struct

import numpy as np


def idx_bytes(array: np.ndarray, code: int = 0x08, dtype: str = "u1") -> bytes:
    """The IDX file of ``array``, written by hand from the format's description."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(dtype).tobytes()


def write_mnist(folder, images=None, labels=None, suffix=""):
    """Twelve training and four test images of 3x2 pixels in MNIST's file names and format."""
    rng = np.random.default_rng(0)
    pack = gzip.compress if suffix else bytes
    for part, n in (("train", 12), ("t10k", 4)):
        files = {
            "images-idx3": rng.integers(0, 256, (n, 3, 2)) if images is None else images,
            "labels-idx1": np.arange(n) % 10 if labels is None else labels,
        }
        for kind, array in files.items():
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(pack(idx_bytes(array)))
