"""Judges pictures by a model that `--mode export` wrote; needs numpy, pillow and onnxruntime, and nothing else.

    python run_onnx.py model.onnx PATH...

Reads JPEG and PNG files of 8 bits per channel, and all such files in folders, as the program itself reads them, and
prints a line of CSV for each. The peak is the place of the highest value of the map, in pixels of the picture as people
see it. Leaves with status 1 if a file could not be judged; its line says why.
"""

import csv
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

COLUMNS = ("path", "score", "p_value", "threshold", "verdict", "peak_x", "peak_y", "peak_value", "error")
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # by the tag, what turns a picture upright
ORIENTATION = 0x0112
ODD = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")  # moves cursors


def files_of(places):
    """Each file, and the pictures in each folder, nested ones too; hidden ones are passed over."""
    for place in places:
        if not Path(place).is_dir():
            yield Path(place)
        for folder, inner, names in os.walk(place):
            inner[:] = sorted(n for n in inner if not n.startswith("."))
            for name in sorted(names):
                if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith("."):
                    yield Path(folder) / name


def orientation_of(image):
    """1, upright, where a file does not say, or says nonsense."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def background_of(facts):
    """What the model's classes lay transparent pictures on."""
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


def judge(session, facts, path):
    """A line of the table."""
    image, side = read(path, facts), facts["input_size"]
    pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS).convert("RGB"))
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {"image": pixels[None]})
    found = {name: value[0] for name, value in zip(names, outputs, strict=True)}
    y, x = np.unravel_index(found["map"].argmax(), found["map"].shape)
    row = {
        "score": f"{found['score']:.6g}", "peak_value": f"{found['map'].max():.6g}",
        "peak_x": int((x + 0.5) * image.width / found["map"].shape[1]),
        "peak_y": int((y + 0.5) * image.height / found["map"].shape[0]),
    }  # fmt: skip
    if "verdict" in found:
        row |= {n: f"{found[n]:.6g}" for n in ("p_value", "threshold")}
        row["verdict"] = "defect" if found["verdict"] else "good"
    return row


def cell(text):  # of one line, and behind an apostrophe where a spreadsheet would compute it
    text = ODD.sub(lambda c: ascii(c[0])[1:-1], os.fsencode(text).decode("utf-8", "backslashreplace"))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def main(arguments):
    """Status: 0, 1 if a file could not be judged, 2 for a mistake on the command line."""
    if len(arguments) < 2:
        print("usage: python run_onnx.py model.onnx PATH...", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # Pillow's, of large images; of too large ones it makes an error
    session = onnxruntime.InferenceSession(arguments[0], providers=onnxruntime.get_available_providers())
    facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    failed = 0
    for path in files_of(arguments[1:]):
        try:
            row = judge(session, facts, path)
        except Exception as error:  # decoders of damaged files raise anything
            failed += 1
            row = {"error": cell(getattr(error, "strerror", None) or str(error) or type(error).__name__)}
        table.writerow({"path": cell(path)} | row)
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
