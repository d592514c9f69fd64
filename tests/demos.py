"""The demo with so little training that it takes a second."""

from upweight.demo.network import Recipe

QUICK = Recipe(epochs=3, fewest_batches=3)
