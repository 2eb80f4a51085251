"""The data of the initialisation study: files in MNIST's format, and the digits."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from idx_files import idx_bytes, write_mnist

from fastdeq import study

CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


@pytest.mark.parametrize("dtype", CODES)
def test_idx_holds_every_dtype_of_the_format(tmp_path, dtype):
    values = np.array([[1, 2, 3], [4, 5, 120]])
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(values, CODES[dtype], dtype))
    read = study.read_idx(path)
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert read.tolist() == values.tolist()


def test_idx_gzip_is_told_by_content_not_by_name(tmp_path):
    path = tmp_path / "values.idx"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(6).reshape(1, 2, 3))))
    assert study.read_idx(path).tolist() == [[[0, 1, 2], [3, 4, 5]]]


GOOD = idx_bytes(np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
        (b"\0\0\x07" + GOOD[3:], "dtype code 0x07; known codes: 0x08, 0x09"),
        (GOOD[:9], "2 dimensions need 12 bytes, the file has 9"),
        (GOOD[:-1], r"truncated data: an array \(2, 3\) of uint8 needs 18 bytes.* has 17"),
        (GOOD + b"\0", "bytes after the data"),
        # 2^96 values: the size must not be computed in machine integers, nor be allocated.
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"\0", "truncated data"),
        (gzip.compress(GOOD, mtime=0)[:-4], "damaged or truncated gzip"),
        (b"\x1f\x8b" + b"\xff" * 30, "damaged or truncated gzip"),
    ],
)
def test_idx_that_is_none_says_why_and_where(tmp_path, content, message):
    path = tmp_path / "broken-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        study.read_idx(path)
    assert "broken-file" in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_folder(tmp_path, suffix):
    write_mnist(tmp_path, suffix=suffix)
    dataset = study.mnist(tmp_path)
    assert dataset.x_train.shape == (12, 6)
    assert dataset.x_test.shape == (4, 6)
    assert dataset.y_train.tolist() == [*range(10), 0, 1]
    assert torch.allclose(dataset.x_train.mean(0), torch.zeros(6), atol=1e-5)


def test_mnist_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz"):
        study.mnist(tmp_path)
    write_mnist(tmp_path, labels=np.zeros(5))
    with pytest.raises(ValueError, match=r"12 images, but labels of shape \(5,\)"):
        study.mnist(tmp_path)
    write_mnist(tmp_path, labels=np.full(12, 10))
    with pytest.raises(ValueError, match="labels must be 0 to 9, got 10"):
        study.mnist(tmp_path)
    write_mnist(tmp_path, images=np.zeros((12, 6)))
    with pytest.raises(ValueError, match=r"\(N, rows, columns\) needed"):
        study.mnist(tmp_path)


def test_digits_are_split_by_class_and_standardised():
    dataset = study.digits(seed=3)
    assert dataset.x_train.shape == (1347, 64)
    assert dataset.x_test.shape == (450, 64)
    assert dataset.x_train.dtype == torch.float32
    assert dataset.y_train.dtype == torch.int64
    shares = [torch.bincount(y) / len(y) for y in (dataset.y_train, dataset.y_test)]
    assert torch.allclose(*shares, atol=0.005)
    assert float(dataset.x_train.mean(0).abs().max()) < 1e-5
    assert float(dataset.x_train.std(0).max()) < 1.01
    assert torch.equal(dataset.x_test, study.digits(seed=3).x_test)
    assert not torch.equal(dataset.x_test, study.digits(seed=4).x_test)
    with pytest.raises(ValueError, match="test_share"):
        study.digits(test_share=1.0)


def test_a_study_on_other_data_of_the_same_form_needs_another_folder(tmp_path):
    """Runs are found by their settings, of which the folder of MNIST is none."""
    from fastdeq.study.store import Store

    folders = []
    for name, labels in (("same", None), ("again", None), ("other", [9, 1, 2])):
        folder = tmp_path / name
        folder.mkdir()
        images = None if labels is None else np.zeros((3, 3, 2))
        write_mnist(folder, images, None if labels is None else np.array(labels))
        folders.append(study.mnist(folder).fingerprint)
    store = Store(tmp_path / "study")
    store.check_data("mnist", folders[0])
    Store(tmp_path / "study").check_data("mnist", folders[1])
    with pytest.raises(ValueError, match="other data for the task 'mnist'"):
        store.check_data("mnist", folders[2])


def test_pixels_have_unit_deviation_and_nearly_blank_ones_no_more():
    data = study.digits()
    deviations = data.x_train.std(0, unbiased=False)
    assert (deviations <= 1 + 1e-5).all()
    # Of 64 pixels a few are nearly blank; the floor is far below the deviation of the others.
    assert (deviations > 1 - 1e-5).sum() > 45
    assert data.x_test.abs().max() < 1 / 0.05
