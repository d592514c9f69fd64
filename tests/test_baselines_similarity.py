"""EmbeddingSimilarity: cosines of what the last layer sees, and neighbours that disagree about the label."""

import torch
import torch.nn.functional as F
from networks import Tagger
from refusals import refused
from small_problem import QUERY, TRAIN, small
from torch import nn

import upweight as uw

TASK = uw.Classification()
X, _ = TRAIN


def test_similarity_is_the_cosine_of_what_the_last_layer_sees():
    model = small()
    body = model[:-1]
    f, q = (F.normalize(body(x).detach(), dim=1) for x in (X, QUERY[0]))
    scores = uw.EmbeddingSimilarity(model, TASK, batch_size=5).fit(TRAIN).attribute(QUERY)
    torch.testing.assert_close(scores.values, q @ f.T, rtol=1e-10, atol=1e-12)
    assert scores.info["features_of"].endswith("weight")


def test_neighbours_disagree_where_labels_differ():
    """Three tight clusters, one example of which has another label: all its neighbours disagree, a third of theirs."""
    angles = torch.tensor([0.0, 0.01, 0.02, 0.03, 2.0, 2.01, 2.02, 2.03, 4.0, 4.01, 4.02, 4.03])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    y = torch.arange(12) // 4
    y[5] = 0
    method = uw.EmbeddingSimilarity(nn.Linear(2, 3), TASK, neighbours=3, memory=2000).fit((x, y))
    third = 1 / 3
    expected = torch.tensor([0, 0, 0, 0, third, 1, third, third, 0, 0, 0, 0])
    torch.testing.assert_close(method.self_influence().values, expected)
    with refused("have no 12 neighbours each"):
        uw.EmbeddingSimilarity(nn.Linear(2, 3), TASK, neighbours=12).fit((x, y)).self_influence()
    with refused("GiB, expected at most"):
        uw.EmbeddingSimilarity(nn.Linear(2, 3), TASK, memory=50).fit((x, y))
    regression = uw.EmbeddingSimilarity(nn.Linear(2, 2), uw.Regression(), neighbours=2).fit((x, x))
    with refused("expected one class label an example"):
        regression.self_influence()


def test_features_at_several_positions_are_averaged_over_the_mask():
    torch.manual_seed(0)
    model, tokens = Tagger(), torch.randint(20, (7, 5))
    y = torch.arange(7) % 3
    task = uw.Classification()
    features = F.normalize(model.embed(tokens).detach().mean(1), dim=1)
    found = uw.EmbeddingSimilarity(model, task).fit((tokens, y)).attribute((tokens, y)).values
    torch.testing.assert_close(found, features @ features.T)
    task.mask = lambda batch: (batch[0] > 4).to(torch.int64)
    kept = (tokens > 4)[..., None]
    means = (model.embed(tokens).detach() * kept).sum(1) / kept.sum(1).clamp_min(1)
    features = F.normalize(means, dim=1)
    found = uw.EmbeddingSimilarity(model, task).fit((tokens, y)).attribute((tokens, y)).values
    torch.testing.assert_close(found, features @ features.T)
