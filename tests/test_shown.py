"""How examples look: pictures, words, tokens and rows, whatever the data is, and whatever show returns."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torch import nn
from torch.utils.data import Dataset

import upweight as uw
from upweight.report.shown import as_picture, drawn_in_ink, shown, thumbnail, words


def made(x, y=None, show=None, **options):
    y = torch.arange(len(x)) % 2 if y is None else y
    return uw.Experiment(nn.Linear(1, 2), uw.Classification(), (x, y), (x[:2], y[:2]), show=show, **options)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_bytes_are_shown_as_they_are():
    x = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    assert (pixels(thumbnail(made(x), "train", 2)) == x[2].permute(1, 2, 0).numpy()).all()


def test_numbers_from_0_to_1_are_brightness():
    x = torch.rand(4, 1, 8, 8)
    assert (pixels(thumbnail(made(x), "train", 1)) == (255 * x[1, 0]).round().numpy()).all()


def test_standardised_colours_come_back_and_are_the_same_for_all_examples():
    levels = torch.rand(50, 3, 8, 8)
    levels[:, :, 0, 0], levels[:, :, 0, 1] = 0, 1
    mean, deviation = (
        torch.tensor([0.4, 0.5, 0.3])[:, None, None],
        torch.tensor([0.2, 0.3, 0.1])[:, None, None],
    )
    experiment = made((levels - mean) / deviation)
    for position in (0, 7):
        seen = pixels(thumbnail(experiment, "train", position)) / 255
        assert np.abs(seen - levels[position].permute(1, 2, 0).numpy()).max() < 0.005


@pytest.mark.parametrize(
    ("shape", "size"),
    [((5, 6), (6, 5)), ((3, 5, 6), (6, 5)), ((5, 6, 3), (6, 5)), ((1, 5, 6), (6, 5)), ((4, 5, 6), (6, 5))],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_show_may_return_numbers_of_any_layout(shape, size, kind):
    experiment = made(torch.zeros(3, 2), show=lambda example: kind(np.zeros(shape)))
    one = shown(experiment, "query", [1])[0]
    assert one.size == size and one.words == one.label == "1"


def test_show_may_return_a_picture_of_any_mode():
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"):
        experiment = made(torch.zeros(3, 2), show=lambda example, mode=mode: Image.new(mode, (300, 200)))
        assert shown(experiment, "train", [0])[0].size == (128, 85)
        assert shown(experiment, "train", [0], side=0)[0].size == (300, 200)


def test_what_is_no_image_is_not_shown_as_one():
    for shape in ((5,), (7, 2), (40, 8), (3, 3, 3), (2, 9, 9), ()):
        data = torch.zeros(3, *shape)
        assert thumbnail(made(data), "train", 0) is None
    assert as_picture("text") is None and as_picture(np.zeros((0, 3))) is None
    assert as_picture(np.zeros((3, 3), complex)) is None and as_picture(np.array([["a"]])) is None


def test_numbers_that_are_none_are_black():
    assert (np.asarray(as_picture(np.array([[np.nan, 1.0], [np.inf, 0.0]]))) == [[0, 255], [255, 0]]).all()
    assert (np.asarray(as_picture(np.full((2, 2), np.nan))) == 0).all()


def test_text_tokens_and_rows():
    x = torch.tensor([[1.5, -2.0], [0.0, 1.0], [3.0, 4.0]])
    text = made(x, show=lambda example: f"row {example[0][0]:g}", classes=["no", "yes"])
    assert words(text, "train", 2) == "row 3" and shown(text, "train", [1])[0].label == "yes"
    assert shown(text, "train", [0])[0].fields is None
    tokens = shown(made(x, show=lambda example: [("good", 1), (" bad", -0.5)]), "train", [0])[0]
    assert tokens.tokens == [("good", 1.0), (" bad", -0.5)] and tokens.words == "good bad"
    assert shown(made(x), "train", [0])[0].fields == [("x0", 1.5), ("x1", -2.0)]
    named = made(x, features=["age", "<b>"])
    assert shown(named, "train", [2])[0].fields == [("age", 3.0), ("<b>", 4.0)]
    with refused("1 features are named, but an input has shape .2."):
        made(x, features=["age"])
    with refused("features='age' is one text"):
        made(x, features="age")


def test_a_dict_of_tensors_has_a_label_too():
    data = {"input_ids": torch.arange(6).reshape(3, 2), "labels": torch.tensor([0, 1, 0])}
    experiment = uw.Experiment(nn.Linear(1, 2), uw.Classification(), data, data, classes=["no", "yes"])
    assert [one.words for one in shown(experiment, "train", [1, 2])] == ["yes", "no"]


class WithHoles(Dataset):
    """Pictures of which one is missing and one has another size."""

    def __len__(self):
        return 4

    def __getitem__(self, k):
        if k == 2:
            raise FileNotFoundError("no/where.png")
        return torch.rand(3, 8, 8 + 2 * (k == 3), generator=torch.Generator().manual_seed(k)), k % 2


def test_one_example_that_cannot_be_read_stops_nothing():
    readable = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    experiment = made(*readable)
    object.__setattr__(experiment, "train", uw.Examples.__new__(uw.Examples))
    experiment.train.__dict__.update(uw.Examples(readable).__dict__, n=4, ids=range(4))
    data = WithHoles()
    experiment.train.take = lambda rows: torch.utils.data.default_collate([data[k] for k in rows])
    looks = shown(experiment, "train", [0, 1, 2, 3])
    assert [look.picture is not None for look in looks] == [True, True, False, True]
    assert "FileNotFoundError: no/where.png" in looks[2].problem and looks[3].size == (10, 8)
    assert thumbnail(experiment, "train", 2) is None and words(experiment, "train", 2) == ""


def test_a_show_that_raises_falls_back_and_says_so():
    one = shown(made(torch.rand(3, 1, 8, 8), show=lambda example: 1 / 0), "train", [1])[0]
    assert one.problem == "show(example) raised ZeroDivisionError: division by zero"
    assert one.picture is not None and one.words == "1"


@pytest.mark.parametrize("error", [OSError("cut"), SyntaxError("broken PNG file"), IndexError("decoder")])
def test_a_picture_that_cannot_be_decoded_stops_nothing_and_says_so(error, monkeypatch):
    """PIL decodes when the pixels are asked for, and its decoders raise far more than OSError."""

    def raises(self):
        raise error

    bundle = made(torch.rand(6, 1, 8, 8), show=lambda example: Image.new("RGB", (300, 300)))
    monkeypatch.setattr(Image.Image, "load", raises)
    (look,) = shown(bundle, "train", [0])
    assert look.picture is None and "cannot be decoded" in look.problem


def test_positions_and_names_are_checked():
    experiment = made(torch.rand(3, 1, 8, 8))
    with refused("there are no 'test' examples"):
        thumbnail(experiment, "test", 0)
    for position in (-1, 3):
        with refused(f"no train example at {position}, expected 0 to 2"):
            words(experiment, "train", position)


def test_ink_is_recognised_by_its_border():
    strokes = torch.zeros(3, 1, 9, 9)
    strokes[:, :, 3:6, 3:6] = 1
    assert drawn_in_ink(shown(made(strokes), "train", [0, 1]))
    assert not drawn_in_ink(shown(made(1 - strokes), "train", [0, 1]))
    assert not drawn_in_ink(shown(made(strokes.expand(3, 3, 9, 9)), "train", [0, 1]))
    assert not drawn_in_ink(shown(made(torch.zeros(3, 2)), "train", [0, 1]))
