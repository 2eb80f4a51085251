"""Handwritten digits: scikit-learn's, which need no download, and MNIST from its IDX files.

Text is in text.py.

IDX, all numbers big-endian: two zero bytes, a dtype code, the number of dimensions, the sizes as
uint32, then the values, last dimension fastest. Source: the format note on the MNIST page (LeCun,
Cortes and Burges).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_CLASSES = 10


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels, by default images as rows: x ``(N, n)`` float32, y ``(N,)`` int64 in
    [0, classes); of a text x and y are codes ``(N, T)``, y being the characters that follow."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int = _CLASSES

    @property
    def in_features(self) -> int:
        return self.x_train.shape[1]

    @property
    def fingerprint(self) -> str:
        """A hash of all labels and of the sizes. Inputs, which are standardised in floating point,
        may differ in a bit from one machine to the next."""
        digest = hashlib.sha256()
        for x, y in ((self.x_train, self.y_train), (self.x_test, self.y_test)):
            digest.update(str(tuple(x.shape)).encode())
            digest.update(y.numpy().tobytes())
        return digest.hexdigest()


def digits(seed: int = 0, *, test_share: float = 0.25) -> Dataset:
    """The 1797 digits of 8x8 pixels of scikit-learn, split and standardised.

    Args:
        seed: of the split, which is stratified: each class has its share in both parts.
        test_share: in (0, 1).

    Raises:
        ValueError: a share outside (0, 1).

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), got {test_share!r}.")
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images / 16, labels, test_size=test_share, stratify=labels, random_state=seed
    )
    return _dataset(x_train, y_train, x_test, y_test)


def mnist(folder: str | Path) -> Dataset:
    """MNIST, or a set in its form, from its four IDX files in ``folder``, plain or gzipped.

    The names are those of the original: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``
    and ``t10k-...``, with or without ``.gz``.

    Raises:
        FileNotFoundError: a file is not there. ValueError: as for :func:`read_idx`; images that are
            not uint8 ``(N, rows, columns)``; labels that are not ``(N,)`` or not below 10.
    """
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(_find(Path(folder), f"{part}-images-idx3-ubyte"))
        labels = read_idx(_find(Path(folder), f"{part}-labels-idx1-ubyte"))
        if images.dtype != np.uint8 or images.ndim != 3:
            raise ValueError(
                f"{part} images are {images.dtype} {images.shape}; uint8 (N, rows, columns) needed."
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{part}: {len(images)} images, but labels of shape {labels.shape}.")
        if labels.size and not 0 <= labels.min() <= labels.max() < _CLASSES:
            raise ValueError(f"{part} labels must be 0 to {_CLASSES - 1}, got {labels.max()}.")
        parts += [images.reshape(len(images), -1) / 255, labels]
    return _dataset(*parts)


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, plain or gzipped (told by content, not by name).

    Returns:
        An array in the file's shape; uint8, int8, int16, int32, float32 or float64, native order.

    Raises:
        FileNotFoundError: no such file. ValueError: not an IDX file, an unknown dtype code, fewer
            or more bytes than the sizes ask for, or a damaged gzip stream; the message names the
            file and both numbers.
    """
    raw = Path(path).read_bytes()
    if raw.startswith(_GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged or truncated gzip stream ({error}).") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(
            f"{path}: not an IDX file: it must begin with two zero bytes, a dtype code and the "
            f"number of dimensions, and begins with {raw[:4].hex(' ') or 'nothing'}."
        )
    code, dimensions = raw[2], raw[3]
    if code not in _IDX_DTYPES:
        known = ", ".join(f"0x{c:02x}" for c in _IDX_DTYPES)
        raise ValueError(f"{path}: unknown IDX dtype code 0x{code:02x}; known codes: {known}.")
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise ValueError(
            f"{path}: truncated header: {dimensions} dimensions need {header} bytes, "
            f"the file has {len(raw)}."
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, offset=4))
    dtype = np.dtype(_IDX_DTYPES[code])
    expected = header + math.prod(shape) * dtype.itemsize  # Python integers: no overflow
    if len(raw) != expected:
        kind = "truncated data" if len(raw) < expected else "bytes after the data"
        raise ValueError(
            f"{path}: {kind}: an array {shape} of {dtype.name} needs {expected} bytes with its "
            f"header, the file has {len(raw)}."
        )
    values = np.frombuffer(raw, dtype, offset=header).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"neither {name} nor {name}.gz in {folder}")


def _dataset(
    x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> Dataset:
    """Pixels in [0, 1] to zero mean and unit deviation, by the training part's statistics.

    The floor of a deviation, 5 % of the range, keeps a pixel that is nearly always blank in the
    training part from becoming an outlier in the test part.
    """
    mean = x_train.mean(0)
    deviation = np.maximum(x_train.std(0), 0.05)

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        standardised = (x - mean) / deviation
        return (
            torch.tensor(standardised, dtype=torch.float32),
            torch.tensor(y.astype(np.int64)),
        )

    return Dataset(*tensors(x_train, y_train), *tensors(x_test, y_test))
