"""CIFAR-10 from its archive: images, groups, damaged files, and pickles that would run code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_datasets, resolve_classes, resolve_root
from datasets.cifar10 import loads
from datasets.folder import ImageFolder
from default import DataConfig, UsageError
from fake_sets import CIFAR_LABELS, cifar_files, make_cifar


def load(root: Path, group: str) -> tuple[ImageFolder, ImageFolder]:
    return build_datasets(DataConfig(dataset="cifar10", data_path=str(root), input_size=32), (group,))


@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar_images_are_those_of_the_archive(unpacked: bool, tmp_path: Path) -> None:
    files = cifar_files()
    make_cifar(tmp_path, files, unpacked=unpacked)
    train, test = load(tmp_path, "13579")
    assert {item.kind for item in train.items} == {f"{n}_{CIFAR_LABELS[n]}" for n in (1, 3, 5, 7, 9)}
    assert {item.kind for item in test.items if item.label} == {f"{n}_{CIFAR_LABELS[n]}" for n in (0, 2, 4, 6, 8)}
    data = pickle.loads(files["data_batch_2"])[b"data"]
    item = next(i for i in train.items if i.name == "00023")  # the fourth image of the second batch
    np.testing.assert_array_equal(np.asarray(Image.open(item.path)), data[3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert item.kind == "3_cat"


def test_cifar_is_written_once(tmp_path: Path) -> None:
    data = DataConfig(dataset="cifar10", data_path=str(make_cifar(tmp_path)))
    resolve_root(data)
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert len(build_datasets(data, ("01234",))[1]) == 20
    assert not list(tmp_path.glob(".making*"))


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.place}",)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    files = cifar_files() | {"data_batch_3": pickle.dumps({b"data": Evil(tmp_path / "ran")}, protocol=2)}
    make_cifar(tmp_path, files)
    with pytest.raises(UsageError, match=r"data_batch_3: cannot be read as a part of CIFAR-10 \(it asks for"):
        load(tmp_path, "01234")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cifar-10-png").exists()
    with pytest.raises(UsageError, match=r"builtins\.eval"):
        loads(b"cbuiltins\neval\n(S'1'\ntR.", "x")


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_any_age_are_read(protocol: int) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    found = loads(pickle.dumps({b"data": array, "labels": [1, 2]}, protocol=protocol), "x")
    np.testing.assert_array_equal(found["data"], array)
    assert found["labels"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_4": b""}, "data_batch_4: cannot be read"),
        ({"data_batch_4": None}, "CIFAR-10 lacks data_batch_4"),
        ({"test_batch": pickle.dumps({b"data": [1], b"labels": [1]})}, r"test_batch: expected data \(N, 3072\)"),
        ({"batches.meta": pickle.dumps({b"label_names": [b"../x"] * 10})}, "batches.meta: expected ten label_names"),
    ],
)
def test_damaged_archives(change: dict, message: str, tmp_path: Path) -> None:
    files = {name: content for name, content in (cifar_files() | change).items() if content is not None}
    with pytest.raises(UsageError, match=message):
        load(make_cifar(tmp_path, files), "01234")


def test_groups_are_never_of_one_model(tmp_path: Path) -> None:
    data = DataConfig(dataset="cifar10", data_path=str(make_cifar(tmp_path)), multi_class=True)
    with pytest.raises(UsageError, match="--multi-class: 01234, 56789, 02468, 13579 of CIFAR-10 are splits"):
        resolve_classes(data)
