"""The second moments of convolution windows against the windows themselves."""

import pytest
import torch

from upweight.curvature.windows import Geometry, Inputs, WindowMoments
from upweight.gradients.blocks import Factored, Piece
from upweight.gradients.operations import Patches

GEOMETRIES = {
    "3x3 same": (Patches((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (5, 6), 4, 1),
    "3x3 valid": (Patches((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)), (5, 4), 3, 1),
    "map smaller than the kernel": (Patches((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (1, 2), 2, 1),
    "more padding than map": (Patches((3, 3), (1, 1), ((3, 3), (2, 2)), (1, 1)), (2, 2), 2, 1),
    "dilated, uneven padding": (Patches((3, 2), (1, 1), ((2, 1), (0, 1)), (2, 3)), (6, 7), 2, 1),
    "groups": (Patches((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (4, 4), 6, 3),
    "stride along the second axis": (Patches((5, 3), (1, 2), ((2, 2), (1, 1)), (1, 1)), (7, 7), 2, 1),
    "one axis": (Patches((4,), (1,), ((1, 2),), (1,)), (9,), 3, 1),
    "three axes": (Patches((2, 3, 2), (1, 1, 1), ((0, 1), (1, 1), (0, 0)), (1, 1, 1)), (3, 4, 3), 2, 1),
    "wide": (Patches((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (4, 4), 90, 1),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_equal_to_the_windows(name):
    patches, space, channels, groups = GEOMETRIES[name]
    maps = torch.randn(7, 1, *space, channels, dtype=torch.float64)
    piece = Piece(torch.zeros(7, 1, 1), maps, patches, patches.count(space))
    geometry = Geometry.of(piece, groups)
    assert geometry is not None
    moments = WindowMoments(geometry, means=True)
    for part in maps.flatten(0, 1).split([1, 4, 2]):
        moments.add(part)
    windows = patches.of(maps.flatten(0, 1), groups, False).flatten(1, 2)
    torch.testing.assert_close(moments.second(), windows.mT @ windows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.first(), windows.sum(1), rtol=1e-12, atol=1e-12)


def test_cropped_windows():
    # the input of a transposed convolution may be met by fewer windows than there is room for
    patches = Patches((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))
    maps = torch.randn(3, 2, 6, 6, 2, dtype=torch.float64)
    piece = Piece(torch.zeros(3, 1, 1), maps, patches, windows=(2, 3))
    geometry = Geometry.of(piece, 1)
    assert geometry is not None
    moments = WindowMoments(geometry)
    moments.add(maps.flatten(0, 1))
    windows = piece.right(1, False).flatten(1, 2)
    torch.testing.assert_close(moments.second(), windows.mT @ windows, rtol=1e-12, atol=1e-12)
    assert moments.first() is None


@pytest.mark.parametrize("split", [1, 3, 50])
def test_the_same_whatever_the_batches(split):
    patches, space, channels, _ = GEOMETRIES["3x3 same"]
    maps = torch.randn(300, 1, *space, channels)
    geometry = Geometry.of(Piece(torch.zeros(1, 1, 1), maps, patches, patches.count(space)), 1)
    assert geometry is not None
    whole, cut = WindowMoments(geometry), WindowMoments(geometry)
    whole.add(maps.flatten(0, 1))
    for part in maps.flatten(0, 1).split(split):
        cut.add(part)
    assert torch.equal(whole.second(), cut.second())


def test_maps_of_several_sizes_and_strides_come_together():
    """A layer that is called on maps of several sizes, once with windows that do not overlap row by row."""
    near = Patches((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    apart = Patches((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
    sizes = [((4, 4), near), ((6, 5), near), ((5, 5), apart)]
    uses = [(torch.randn(2, 1, *space, 3, dtype=torch.float64), patches) for space, patches in sizes]
    blocks = [
        Factored((Piece(torch.zeros(2, 1, 1), maps, patches, patches.count(maps.shape[2:4])),))
        for maps, patches in uses
    ]
    inputs = Inputs(means=True)
    for block in blocks:
        inputs.add(block, None)
    rows = torch.cat([block.inputs().flatten(1, 2) for block in blocks], 1)
    torch.testing.assert_close(inputs.second(), rows.mT @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.first(), rows.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "patches",
    [
        Patches((1, 3), (1, 1), ((0, 0), (1, 1)), (1, 1)),
        Patches((3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1)),
    ],
)
def test_windows_that_share_no_rows_are_left_to_others(patches):
    assert Geometry.of(Piece(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4, 4, 1), patches, (4, 4)), 1) is None
