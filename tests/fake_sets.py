"""Small generated copies of the other data sets, in exactly the layouts of the real ones."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np

from fake_data import picture, save

RNG = np.random.default_rng(5)
CIFAR_LABELS = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip


def good(path: Path, size: int = 64) -> None:
    save(path, picture(RNG, size=size)[0])


def bad(path: Path, *masks: Path, value: int = 255, size: int = 64) -> np.ndarray:
    """A defective image and its mask, cut into as many files as there are paths."""
    image, mask = picture(RNG, defect=True, size=size)
    save(path, image)
    rows = np.array_split(np.flatnonzero(mask.any(1)), max(len(masks), 1))
    for target, part in zip(masks, rows, strict=False):
        own = np.zeros_like(mask)
        own[part] = mask[part]
        save(target, own.astype(np.uint8) * value, "L")
    return mask


def black(path: Path, size: int = 64) -> None:
    save(path, np.zeros((size, size), np.uint8), "L")


def make_btad(root: Path) -> Path:
    for name, image, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        folder = root / "BTech_Dataset_transformed" / name
        for i in range(3):
            good(folder / "train" / "ok" / f"{i:04d}.{image}")
            good(folder / "test" / "ok" / f"{i:04d}.{image}")
            bad(folder / "test" / "ko" / f"{i:04d}.{image}", folder / "ground_truth" / "ko" / f"{i:04d}.{mask}")
    black(root / "BTech_Dataset_transformed" / "02" / "ground_truth" / "ko" / "0000.png")  # as in the original
    return root


def make_mpdd(root: Path) -> Path:
    for name in ("tubes", "connector"):
        for i in range(3):
            good(root / name / "train" / "good" / f"{i:03d}.png")
            good(root / name / "test" / "good" / f"{i:03d}.png")
            bad(
                root / name / "test" / "parts_mismatch" / f"{i:03d}.png",
                root / name / "ground_truth" / "parts_mismatch" / f"{i:03d}_mask.png",
            )
    return root


def make_ad_2(root: Path, classes: tuple[str, ...] = ("can", "vial")) -> Path:
    for name in classes:
        for i in range(3):
            good(root / name / "train" / "good" / f"{i:03d}_regular.png")
            good(root / name / "validation" / "good" / f"{i:03d}_regular.png")
            public = root / name / "test_public"
            for light in ("regular", "overexposed"):
                good(public / "good" / f"{i:03d}_{light}.png")
                bad(
                    public / "bad" / f"{i:03d}_{light}.png",
                    public / "ground_truth" / "bad" / f"{i:03d}_{light}_mask.png",
                )
            good(root / name / "test_private" / f"{i:03d}_regular.png", size=48)
            good(root / name / "test_private_mixed" / f"{i:03d}_mixed.png")
    return root


def make_loco(root: Path, classes: tuple[str, ...] = ("pushpins",)) -> Path:
    for name in classes:
        folder = root / name
        for i in range(3):
            for part in ("train", "validation", "test"):
                good(folder / part / "good" / f"{i:03d}.png")
            for kind, value in (("logical_anomalies", 251), ("structural_anomalies", 252)):
                truth = folder / "ground_truth" / kind / f"{i:03d}"
                bad(folder / "test" / kind / f"{i:03d}.png", *(truth / f"{n:03d}.png" for n in range(2)), value=value)
        rows = [
            {"defect_name": "missing", "pixel_value": 251, "saturation_threshold": 20, "relative_saturation": False},
            {"defect_name": "broken", "pixel_value": 252, "saturation_threshold": 1.0, "relative_saturation": True},
        ]
        (folder / "defects_config.json").write_text(json.dumps(rows))
    return root


def make_3d(root: Path, classes: tuple[str, ...] = ("bagel",)) -> Path:
    for name in classes:
        for i in range(3):
            for part in ("train", "validation", "test"):
                good(root / name / part / "good" / "rgb" / f"{i:03d}.png")
                (root / name / part / "good" / "xyz").mkdir(exist_ok=True)
                (root / name / part / "good" / "xyz" / f"{i:03d}.tiff").write_bytes(b"depth, which is not read")
            black(root / name / "test" / "good" / "gt" / f"{i:03d}.png")
            kind = root / name / "test" / "crack"
            bad(kind / "rgb" / f"{i:03d}.png", kind / "gt" / f"{i:03d}.png")
    return root


def make_real_iad(root: Path, classes: tuple[str, ...] = ("audiojack",), *, nested: bool = False) -> Path:
    for name in classes:
        rows: dict[str, list[dict]] = {"train": [], "test": []}
        for sample in range(6):
            defective = sample >= 4
            kind = "BX" if defective else "OK"
            for view in range(1, 6):
                stem = f"{name}_{sample:04d}_{'NG_BX' if defective else 'OK'}_C{view}_20230921"
                place = Path("NG/BX" if defective else "OK") / f"S{sample:04d}"
                target = root / "realiad_512" / name / place
                mask = None
                if defective and view < 4:  # the defect does not show from everywhere
                    bad(target / f"{stem}.jpg", target / f"{stem}_mask.png")
                    mask = (place / f"{stem}_mask.png").as_posix()
                else:
                    good(target / f"{stem}.jpg")
                row = {
                    "category": name, "anomaly_class": kind if mask else "OK", "image_path":
                    (place / f"{stem}.jpg").as_posix(), "mask_path": mask,
                }  # fmt: skip
                rows["train" if sample < 2 else "test"].append(row)
        jsons = root / "realiad_jsons" / ("realiad_jsons" if nested else "")
        jsons.mkdir(parents=True, exist_ok=True)
        content = {"meta": {"prefix": f"{name}/", "normal_class": "OK"}, **rows}
        (jsons / f"{name}.json").write_text(json.dumps(content))
    return root


def make_ksdd2(root: Path) -> Path:
    for part in ("train", "test"):
        for i in range(4):
            good(root / part / f"{10000 + i}.png")
            black(root / part / f"{10000 + i}_GT.png")
        for i in range(4, 6):
            bad(root / part / f"{10000 + i}.png", root / part / f"{10000 + i}_GT.png")
    bad(root / "train" / "10301 (copy).png", root / "train" / "10301_GT (copy).png")
    return root


def make_kolektor(root: Path) -> Path:
    for number in range(1, 7):
        folder = root / "KolektorSDD" / f"kos{number:02d}"
        for i in range(3):
            good(folder / f"Part{i}.jpg")
            black(folder / f"Part{i}_label.bmp")
        bad(folder / "Part3.jpg", folder / "Part3_label.bmp")
    return root


def make_autovi(root: Path) -> Path:
    for name in ("tank_screw",):
        for i in range(3):
            good(root / name / "train" / "good" / f"{i:04d}.png")
            good(root / name / "test" / "good" / f"{i:04d}.png")
            truth = root / name / "ground_truth" / "fixing" / f"{i:04d}"
            bad(root / name / "test" / "fixing" / f"{i:04d}.png", truth / "0000.png")
    return root


def make_vad(root: Path) -> Path:
    for i in range(3):
        for part in ("train", "test"):
            good(root / "vad" / part / "good" / f"{i:04d}.png")
            bad(root / "vad" / part / "bad" / f"{i:04d}.png")
        bad(root / "vad" / "test" / "bad_unseen_defects" / f"{i:04d}.png")
    return root


def cifar_files(per_batch: int = 20, test: int = 20) -> dict[str, bytes]:
    """The files of the archive: pickles of protocol 2 with keys of bytes; each class has its own brightness."""

    def batch(count: int, name: str) -> bytes:
        labels = [i % 10 for i in range(count)]
        data = np.stack([RNG.normal(25 * label, 8, 3072).clip(0, 255) for label in labels]).astype(np.uint8)
        names = [f"{CIFAR_LABELS[n]}_s_{i:06d}.png".encode() for i, n in enumerate(labels)]
        content = {b"batch_label": name.encode(), b"labels": labels, b"data": data, b"filenames": names}
        return pickle.dumps(content, protocol=2)

    files = {f"data_batch_{n}": batch(per_batch, f"training batch {n} of 5") for n in range(1, 6)}
    meta = {b"num_cases_per_batch": per_batch, b"label_names": [n.encode() for n in CIFAR_LABELS], b"num_vis": 3072}
    return files | {"test_batch": batch(test, "testing batch 1 of 1"), "batches.meta": pickle.dumps(meta, protocol=2)}


def make_cifar(root: Path, files: dict[str, bytes] | None = None, *, unpacked: bool = False) -> Path:
    files = cifar_files() if files is None else files
    root.mkdir(parents=True, exist_ok=True)
    if unpacked:
        (root / "cifar-10-batches-py").mkdir()
        for name, content in files.items():
            (root / "cifar-10-batches-py" / name).write_bytes(content)
        return root
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root


def make_list(root: Path, suffix: str) -> Path:
    """Images anywhere and a list of them; two classes, of which the second has no masks."""
    rows = []
    for name in ("bolt", "nut"):
        for i in range(6):
            split = "train" if i < 3 else "test" if i < 5 else "calibration"
            path = f"pictures/{name}-{i}.png"
            good(root / path)
            rows.append({"path": path, "split": split, "label": "good", "mask": "", "class": name})
        for i in range(2):
            path, mask = f"pictures/{name}-bad{i}.png", f"drawn/{name}-{i}.png" if name == "bolt" else ""
            bad(root / path, *([root / mask] if mask else []))
            rows.append({"path": path, "split": "test", "label": ("scratch", "1")[i], "mask": mask, "class": name})
    path = root / f"images{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_visa_split(root: Path, name: str) -> None:
    """A two-class split beside the one-class one of `fake_data.make_visa_original`: some defective ones in training."""
    with (root / "split_csv" / "1cls.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["split"] = "train" if number % 3 == 0 else "test"
    with (root / "split_csv" / f"2cls_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
