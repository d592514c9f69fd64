"""What can be given to the explorer as a query: rows of numbers, pictures, and whatever the experiment reads."""

import io

import explorers
import numpy as np
import torch
from explorers import N, experiment
from PIL import Image
from refusals import refused

import upweight as uw
from upweight.explorer.run import Run
from upweight.explorer.uploads import read_query

bundle, run = explorers.bundle, explorers.run  # the fixtures


def test_a_row_of_numbers_is_a_query(tmp_path):
    data = torch.randn(N, 3), torch.arange(N) % 2
    bundle = uw.Experiment(torch.nn.Linear(3, 2), uw.Classification(), data, data)
    predict = Run(bundle, tmp_path).live.predict
    upload = read_query(bundle, None, "0.5, -1; 2e-1", None, predict)
    torch.testing.assert_close(upload.batch[0], torch.tensor([[0.5, -1.0, 0.2]]))
    assert upload.batch[1].tolist() == [int(bundle.model(upload.batch[0]).argmax())]
    assert read_query(bundle, None, "1 2 3", 1.0, predict).batch[1].tolist() == [1]
    for text, message in (
        ("", "nothing to read"),
        ("1, 2", "2 finite numbers, expected 3"),
        ("1, 2, nan", "2 finite numbers, expected 3"),
        ("1, 2, cat", "what is no number"),
    ):
        with refused(message):
            read_query(bundle, None, text, None, predict)


def test_what_is_no_picture_is_refused(run, bundle, tmp_path):
    file = tmp_path / "x.png"
    for content in (b"", b"<svg onload=alert(1)>", png((50, 50))[:500]):
        file.write_bytes(content)
        with refused("x.png is no picture that can be read"):
            read_query(bundle, file, "", None, run.live.predict)
    file.write_bytes(png((5000, 2)))
    with refused("5000 x 2 pixels, expected at most 4096"):
        read_query(bundle, file, "", None, run.live.predict)


def png(size=(20, 10)):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_a_picture_of_another_size_is_scaled_and_its_reading_told(run, bundle, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(png())
    upload = read_query(bundle, file, "", 2.0, run.live.predict)
    assert upload.batch[0].shape == (1, 1, 8, 8) and upload.batch[1].tolist() == [2]
    assert "Scaled to 8 x 8 pixels; black became" in upload.note and upload.picture[:4] == b"\x89PNG"


def test_read_is_the_users_own(tmp_path):
    data = torch.zeros(N, 5, dtype=torch.int64), torch.arange(N) % 2
    model = torch.nn.Sequential(torch.nn.Embedding(9, 2), torch.nn.Flatten(), torch.nn.Linear(10, 2))

    def read(given):
        return torch.tensor([int(word) for word in given.split()])

    bundle = uw.Experiment(model, uw.Classification(), data, data, read=read)
    predict = Run(bundle, tmp_path).live.predict
    assert read_query(bundle, None, "1 2 3 4 5", 0.0, predict).batch[0].tolist() == [[1, 2, 3, 4, 5]]
    with refused("read raised ValueError"):
        read_query(bundle, None, "no numbers", None, predict)
    with refused(r"was read as \[2\], expected a tensor of shape \[5\]"):
        read_query(bundle, None, "1 2", None, predict)
    without = uw.Experiment(model, uw.Classification(), data, data)
    with refused("a text cannot be read as an input of shape"):
        read_query(without, None, "1 2 3 4 5", None, predict)


def test_read_must_be_a_function(bundle):
    with refused("the experiment's read is str, expected a function"):
        experiment(read="no")
