"""Judges pictures by a model that `--mode export` wrote: python run_onnx.py model.onnx PATH...

Needs numpy, pillow and onnxruntime. Reads JPEG and PNG files of 8 bits a channel, and those in folders, as the program
does: a line of CSV for each, the peak in pixels of the picture as people see it. Status 1: see the line of a file.
"""

import contextlib
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
ODD = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")  # moves cursors


def files_of(places):  # each file, and the pictures in each folder, nested ones too; hidden ones are passed over
    for place in map(Path, places):
        found = sorted(p for p in place.rglob("*") if "/." not in f"/{p.relative_to(place).as_posix()}")
        found = [p for p in found if p.is_file() and p.suffix.lower() in (".jpg", ".jpeg", ".png")]
        yield from found if place.is_dir() else [place]


def read(path, facts):  # a file as RGB or grey, upright
    with Image.open(path, formats=("JPEG", "PNG", "MPO")) as image:
        if image.mode.startswith(("I", "F")) or (image.tile and ";16" in str(image.tile[0][3])):
            raise ValueError("has more than 8 bits per channel, which this script does not read")
        if image.format == "PNG" and getattr(image, "is_animated", False):
            raise ValueError("holds several frames; expected one image a file")
        image.load()
        with contextlib.suppress(Exception):  # upright as it lies, and where a file's tags are damaged
            image = image.transpose(TURNS[image.getexif()[0x0112]])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        readings, image = facts["readings"].values(), image.convert("RGBA")
        if not all(r["coarse"] for r in readings) and np.asarray(image)[..., 3].min() < 255:  # coarse: dropped alpha
            (background, *others) = {r["background"] for r in readings}
            if others or background is None:
                raise ValueError("is transparent, and the model's classes do not all lie on one background")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def starts(side, tile, overlap):  # of the tiles along a side
    count = max(-(-(side - overlap) // (tile - overlap)), 1)
    return [round(n * (side - tile) / max(count - 1, 1)) for n in range(count)]


def axis(own, size, facts):  # of a picture's side: the square's, and where what both show begins and ends on either
    full, side = facts["input_size"], facts["center_crop"] or facts["input_size"]
    long = max(round(full * own / {"squash": own, "pad": max(size), "crop": min(size)}[facts["resize"]]), 1)
    cut = round((long - side) / 2)
    first, last = max(-cut, 0), min(long - cut, side)
    return side, first, last, (first + cut) * (own / long), (last + cut) * (own / long)


def look(session, facts, image):  # what the model says of a picture, and the rows and columns that its map is of
    (side, x0, x1, left, right), (_, y0, y1, top, bottom) = (axis(own, image.size, facts) for own in image.size)
    seen = image.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, (left, top, right, bottom)).convert("RGB")
    pixels = np.pad(np.asarray(seen), ((y0, side - y1), (x0, side - x1), (0, 0)), "edge")
    names = (output.name for output in session.get_outputs())
    found = dict(zip(names, (value[0] for value in session.run(None, {"image": pixels[None]})), strict=True))
    x0, x1, y0, y1 = (round(edge * len(found["map"]) / side) for edge in (x0, x1, y0, y1))
    x, y, right, bottom = (round(edge) for edge in (left, top, right, bottom))
    part = Image.fromarray(np.float32(found["map"][y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]))
    shape, extent = (max(right - x, 1), max(bottom - y, 1)), (0, 0, *part.size)
    part = np.asarray(part.transform(shape, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR))
    return found, part, np.s_[:, y : y + len(part), x : x + len(part.T)]


def judge(session, facts, path):  # a line of the table: the highest tile's score, maps that pass into each other
    image, best = read(path, facts), {"score": -np.inf}
    tile, overlap, (wide, high) = facts["tile"] or max(image.size), facts["overlap"], image.size
    total = np.zeros((2, high, wide), np.float32)  # weighted, and the weights
    for y, x in ((y, x) for y in starts(high, tile, overlap) for x in starts(wide, tile, overlap)):
        found, part, seen = look(session, facts, image.crop((x, y, min(x + tile, wide), min(y + tile, high))))
        depths = (n / 2 - abs(np.arange(n) + 0.5 - n / 2) for n in part.shape)  # how far from the tile's border
        weight = np.outer(*(np.minimum(depth / max(overlap, 0.5), 1) for depth in depths))
        total[:, y : y + tile, x : x + tile][seen] += np.stack((part * weight, weight))
        best = max(best, found, key=lambda one: one["score"])
    heat = np.divide(*total, out=np.full((high, wide), -np.inf, np.float32), where=total[1] > 0)
    said = {n: f"{best[n]:.6g}" for n in ("score", "p_value", "threshold") if n in best}
    said |= {"verdict": ("good", "defect")[int(best["verdict"])]} if "verdict" in best else {}
    return said | {"peak_x": heat.argmax() % wide, "peak_y": heat.argmax() // wide, "peak_value": f"{heat.max():.6g}"}


def cell(text):  # of one line, and behind an apostrophe where a spreadsheet would compute it
    text = ODD.sub(lambda c: ascii(c[0])[1:-1], os.fsencode(text).decode("utf-8", "backslashreplace"))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def main(arguments):  # status: 0, 1 if a file could not be judged, 2 for a mistake on the command line
    if len(arguments) < 2:
        return print("usage: python run_onnx.py model.onnx PATH...", file=sys.stderr) or 2
    warnings.simplefilter("ignore")  # Pillow's, of large images; of too large ones it makes an error
    session = onnxruntime.InferenceSession(arguments[0], providers=onnxruntime.get_available_providers())
    facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    table, failed = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n"), 0
    table.writeheader()
    for path in files_of(arguments[1:]):
        try:
            row = judge(session, facts, path)
        except Exception as error:  # decoders of damaged files raise anything
            failed, row = 1, {"error": cell(getattr(error, "strerror", None) or str(error) or type(error).__name__)}
        table.writerow({"path": cell(path)} | row)
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
    os._exit(1)  # who read the table has gone, as `head` does
