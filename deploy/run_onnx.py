"""Judges pictures by a model that `--mode export` wrote; needs numpy, pillow and onnxruntime, and nothing else.

    python run_onnx.py model.onnx PATH...

Reads JPEG and PNG files of 8 bits per channel, and all such files in folders, as the program itself reads them, and
prints a line of CSV for each. The peak is the place of the highest value of the map, in pixels of the picture as people
see it. Leaves with status 1 if a file could not be judged; its line says why.
"""

import csv
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

COLUMNS = ("path", "score", "p_value", "threshold", "verdict", "peak_x", "peak_y", "peak_value", "error")
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # by the tag, what turns a picture upright


def files_of(places):  # each file, and the pictures in each folder, nested ones too; hidden ones are passed over
    for place in places:
        if not Path(place).is_dir():
            yield Path(place)
        for folder, inner, names in os.walk(place):
            inner[:] = sorted(n for n in inner if not n.startswith("."))
            for name in sorted(names):
                if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith("."):
                    yield Path(folder) / name


def orientation_of(image):  # 1, upright, where a file does not say, or says nonsense
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def background_of(facts):  # what the model's classes lay transparent pictures on
    found = {reading["background"] for reading in facts["readings"].values()}
    if len(found) != 1 or None in found:
        raise ValueError("is transparent, and the model's classes do not all lie on one background")
    return found.pop()


def read(path, facts):
    """A file as RGB or grey, upright."""
    with Image.open(path, formats=("JPEG", "PNG", "MPO")) as image:
        if image.mode.startswith(("I", "F")) or (image.tile and ";16" in str(image.tile[0][3])):
            raise ValueError("has more than 8 bits per channel, which this script does not read")
        if image.format == "PNG" and getattr(image, "is_animated", False):
            raise ValueError("holds several frames; expected one image a file")
        image.load()
        image = image.transpose(TURNS[orientation_of(image)]) if orientation_of(image) in TURNS else image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        coarse = all(reading["coarse"] for reading in facts["readings"].values())  # version 1.0 dropped alpha
        image = image.convert("RGBA")
        if not coarse and np.asarray(image)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background_of(facts)), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def axis(own, size, facts):
    """Of a side of a picture of this size: the square's side, and where what both show begins and ends on either."""
    full, side = facts["input_size"], facts["center_crop"] or facts["input_size"]
    long = max(round(full * own / {"squash": own, "pad": max(size), "crop": min(size)}[facts["resize"]]), 1)
    cut = round((long - side) / 2)
    first, last = max(-cut, 0), min(long - cut, side)
    return side, first, last, (first + cut) * (own / long), (last + cut) * (own / long)


def judge(session, facts, path):  # a line of the table
    image, names = read(path, facts), [output.name for output in session.get_outputs()]
    (side, x0, x1, left, right), (_, y0, y1, top, bottom) = (axis(own, image.size, facts) for own in image.size)
    seen = image.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, (left, top, right, bottom)).convert("RGB")
    pixels = np.pad(np.asarray(seen), ((y0, side - y1), (x0, side - x1), (0, 0)), "edge")
    found = {n: value[0] for n, value in zip(names, session.run(names, {"image": pixels[None]}), strict=True)}
    x0, x1, y0, y1 = (round(edge * len(found["map"]) / side) for edge in (x0, x1, y0, y1))
    part = found["map"][y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    y, x = np.unravel_index(part.argmax(), part.shape)
    row = {
        "score": f"{found['score']:.6g}", "peak_value": f"{part.max():.6g}",
        "peak_x": int(left + (x + 0.5) * (right - left) / part.shape[1]),
        "peak_y": int(top + (y + 0.5) * (bottom - top) / part.shape[0]),
    }  # fmt: skip
    if "verdict" in found:
        row |= {n: f"{found[n]:.6g}" for n in ("p_value", "threshold")}
        row["verdict"] = "defect" if found["verdict"] else "good"
    return row


def main(arguments):  # status: 0, 1 if a file could not be judged, 2 for a mistake on the command line
    if len(arguments) < 2:
        return print("usage: python run_onnx.py model.onnx PATH...", file=sys.stderr) or 2
    warnings.simplefilter("ignore")  # Pillow's, of large images; of too large ones it makes an error
    session = onnxruntime.InferenceSession(arguments[0], providers=onnxruntime.get_available_providers())
    facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    if facts.get("tile"):
        print(f"{arguments[0]}: judges tiles, which this script does not cut; the program itself does", file=sys.stderr)
        return 2
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    failed = 0
    for path in files_of(arguments[1:]):
        try:
            row = judge(session, facts, path)
        except Exception as error:  # decoders of damaged files raise anything
            failed += 1
            row = {"error": getattr(error, "strerror", None) or str(error) or type(error).__name__}
        table.writerow({"path": os.fsencode(path).decode("utf-8", "backslashreplace")} | row)
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
