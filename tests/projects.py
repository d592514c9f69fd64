"""What a user has in a working folder before the first command: an experiment, pictures, a table, texts."""

import csv

import numpy as np
from PIL import Image

PETS = """
import sys
sys.path.insert(0, {tests!r})
from run_folders import images

def experiment():
    return images()
"""


def photos(place):
    generator = np.random.default_rng(0)
    for name, shade in (("dark", 40), ("light", 200)):
        (place / "photos" / name).mkdir(parents=True)
        for k in range(12):
            pixels = generator.integers(shade - 30, shade + 30, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{k}.png")
    return place / "photos"


def table(place, regression=False):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 2))
    value = x @ [2, -1]
    target = value.round(3) if regression else np.where(value > 0, "yes", "no")
    with open(place / "houses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["area", "street", "rooms", "price"])
        writer.writerows([a, f"street {k}", b, t] for k, ((a, b), t) in enumerate(zip(x, target)))
    return place / "houses.csv"


def reviews(place, labels=("bad", "good")):
    words = {labels[0]: ["dull", "slow", "poor"], labels[1]: ["bright", "quick", "fine"]}
    with open(place / "reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for k in range(40):
            label = labels[k % 2]
            writer.writerow([f"a {words[label][k % 3]} film, <b>number</b> {k}", label])
    return place / "reviews.csv"


MADE = {"images": photos, "csv": table, "text": reviews, "sklearn": None}
"""{kind of template: what makes its data in a folder}"""
