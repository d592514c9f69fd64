"""The demo's labels, flipped by a seed, and its networks, trained by one."""

import pytest
import torch
from demos import QUICK

from upweight.demo.data import digits, flip_labels
from upweight.demo.network import convolutional_network, one_thread, side_by_side, train_network
from upweight.demo.run import _check_learned
from upweight.errors import UpweightError


def test_flips_are_the_seeds():
    labels = torch.arange(200) % 7
    given, flipped = flip_labels(labels, 7, share=0.1, seed=5)
    again, flipped_again = flip_labels(labels, 7, share=0.1, seed=5)
    assert torch.equal(given, again) and torch.equal(flipped, flipped_again)
    assert int(flipped.sum()) == 20
    assert torch.equal(given != labels, flipped)
    assert int(given.min()) >= 0 and int(given.max()) < 7
    assert not torch.equal(flipped, flip_labels(labels, 7, share=0.1, seed=6)[1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (3, 32, 32), (1, 28, 28), (3, 20, 32)])
def test_network_fits_the_images(shape):
    model = convolutional_network(shape, classes=4, seed=0)
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


def test_training_is_the_seeds_and_leaves_random_state_alone():
    images = digits(n=60)
    state = torch.get_rng_state()
    one, same, other = (
        train_network(images.train.inputs, images.train.labels, 10, seed, None, QUICK) for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    first, second, third = (model[0].weight for model in (one, same, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_examples_left_out_have_no_say():
    images = digits(n=60)
    inputs, labels, without = images.train.inputs, images.train.labels, torch.tensor([0, 7, 31])
    scrambled = inputs.clone()
    scrambled[without] = torch.randn(3, 1, 8, 8)
    plain, blind = (train_network(x, labels, 10, 1, without, QUICK) for x in (inputs, scrambled))
    full = train_network(inputs, labels, 10, 1, None, QUICK)
    assert torch.equal(plain[0].weight, blind[0].weight)
    assert not torch.equal(plain[0].weight, full[0].weight)


def test_side_by_side_keeps_order_and_threads():
    threads, counted = torch.get_num_threads(), []
    assert side_by_side(lambda job: job**2, range(20), lambda: counted.append(1)) == [
        job**2 for job in range(20)
    ]
    assert torch.get_num_threads() == threads and len(counted) == 20


def test_one_thread_is_given_back_after_an_error():
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        raise RuntimeError
    assert torch.get_num_threads() == threads


def test_a_network_that_learned_nothing_is_not_explained():
    given = torch.arange(40) % 4
    with pytest.raises(UpweightError, match=r"learned nothing: it has 25\.0% .* --seed 8, or more images"):
        _check_learned(torch.zeros(40, dtype=torch.long), given, 7)
    _check_learned(given, given, 7)
    _check_learned(torch.zeros(40, dtype=torch.long), torch.zeros(40, dtype=torch.long), 7)
