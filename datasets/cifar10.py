"""CIFAR-10 in UniAD's unified setting: five of its ten classes are normal, the others defects; labels of images only.

Read from the archive of the Python version, cifar-10-python.tar.gz, or from its folder. The images are written as PNG
files beside it on first use. The archive holds pickles: nothing in them but numbers, texts and arrays is made, so that
no code of theirs can run.
"""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.folder import Counts, DatasetSpec, Item, Scan
from datasets.walk import image_files, subfolders
from default import UsageError

ARCHIVE, FOLDER, PNG = "cifar-10-python.tar.gz", "cifar-10-batches-py", "cifar-10-png"
TRAIN, TEST, META = [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta"
GROUPS = ("01234", "56789", "02468", "13579")  # the normal classes (You et al., NeurIPS 2022, table 3)
SIDE = 32


class PlainUnpickler(pickle.Unpickler):
    """Makes lists, dictionaries, numbers, texts and arrays of numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return array_of
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image needs")


def array_of(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, to be filled by its state; never one of a class of somebody's own."""
    return np.ndarray.__new__(np.ndarray, (0,), np.dtype("b"))


def latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into an old kind of pickle."""
    return text.encode("latin1")


def loads(content: bytes, name: str) -> dict[str, Any]:
    """A pickled dictionary with texts as keys.

    Raises:
        UsageError: it is damaged, or would make other things than data.
    """
    try:
        found = PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(
            f"{name}: cannot be read as a part of CIFAR-10 ({str(error) or type(error).__name__})"
        ) from error


def read_files(root: Path) -> dict[str, bytes]:
    """The files of the folder or, without it, of the archive, by name.

    Raises:
        UsageError: neither is there, the archive is damaged, or a file is missing.
    """
    names = [*TRAIN, *TEST, META]
    folder = root if (root / META).is_file() else root / FOLDER
    if folder.is_dir():
        found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    elif (root / ARCHIVE).is_file():
        found = read_archive(root / ARCHIVE, names)
    else:
        raise UsageError(f"--data-path: {root} lacks {ARCHIVE} or {FOLDER}; expected {SPEC.layout}")
    lacking = [name for name in names if name not in found]
    if lacking:
        raise UsageError(f"--data-path: {root}: CIFAR-10 lacks {', '.join(lacking)}")
    return found


def read_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The files of these names; nothing is unpacked."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if member.isfile() and name in names else None
                if file is not None:
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"--data-path: {path}: cannot be read as an archive ({error})") from error
    return found


def images_of(content: bytes, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images (32, 32, 3) uint8 and labels of a batch, whose rows are the red, the green and the blue plane.

    Raises:
        UsageError: it holds something else.
    """
    batch = loads(content, name)
    data: Any = batch.get("data")
    labels = batch.get("labels")
    good = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3 * SIDE**2,)
    if not good or not isinstance(labels, list) or len(labels) != len(data) or not set(labels) <= set(range(10)):
        raise UsageError(f"{name}: expected data (N, {3 * SIDE**2}) uint8 and N labels from 0 to 9")
    yield from zip(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels, strict=True)


def prepare(root: Path) -> None:
    """Write the images as {train,test}/LABEL_NAME/00000.png, whole or not at all; once.

    Raises:
        UsageError: the archive cannot be read, or the folder cannot be written.
    """
    if (root / PNG).is_dir():
        return
    files = read_files(root)
    meta = loads(files[META], META)
    names = [n.decode() if isinstance(n, bytes) else str(n) for n in meta.get("label_names", [])]
    if len(names) != 10 or not all(name.isidentifier() for name in names):
        raise UsageError(f"{META}: expected ten label_names, but got {len(names)}")
    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
        print(f"writing the images of CIFAR-10 to {root / PNG}")
        for part, batches in (("train", TRAIN), ("test", TEST)):
            numbered = enumerate(pair for batch in batches for pair in images_of(files[batch], batch))
            for number, (image, label) in numbered:
                folder = made / part / f"{label}_{names[label]}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{number:05d}.png", compress_level=1)
        made.rename(root / PNG)
    except OSError as error:
        if not (root / PNG).is_dir():  # another program was not faster
            raise UsageError(f"--data-path: cannot write the images to {root / PNG}: {error.strerror}") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def scan_group(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """A group: training images of its five classes, and all test images, of which the other classes' are defects.

    Raises:
        UsageError: there are none.
    """
    root = folder.parent / PNG
    normal = {int(digit) for digit in folder.name}
    parts = {
        part: [
            Item(
                path=path,
                mask_path=None,
                label=int(number_of(kind) not in normal),
                class_index=class_index,
                kind=kind.name,
                name=path.stem,
            )
            for kind in subfolders(root / part)
            for path in image_files(kind)
        ]
        for part in ("train", "test")
    }
    train = [item for item in parts["train"] if not item.label]
    if not train or not parts["test"]:
        raise UsageError(f"--data-path: {root} lacks images of the classes {', '.join(folder.name)}")
    return Scan(train=train, test=parts["test"])


def number_of(kind: Path) -> int:
    return int(kind.name.partition("_")[0])


def found(root: Path) -> tuple[str, ...]:
    return GROUPS


SPEC = DatasetSpec(
    title="CIFAR-10",
    classes=GROUPS,
    places=("data/cifar10", "data/CIFAR-10"),
    scan=scan_group,
    found=found,
    prepare=prepare,
    overlapping=True,
    counts={group: Counts(train=25000, good=5000, bad=5000) for group in GROUPS},
    layout=f"{ARCHIVE}, or {FOLDER}/data_batch_1 ... data_batch_5, test_batch and batches.meta",
    licence="not stated by its authors",
    citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; groups: You et al., UniAD, 2022",
    hint=f"; put {ARCHIVE} there (https://www.cs.toronto.edu/~kriz/cifar.html)",
)
