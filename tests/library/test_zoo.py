from __future__ import annotations

import pytest
import torch

from dist_train.models import MLP, Cifar10Quick, DigitsCNN, LogisticRegression, MnistCNN


def names(module: torch.nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


def test_an_mlp_is_its_linear_layers_with_an_activation_between() -> None:
    model = MLP(784, [512, 512], 10)
    assert names(model) == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert sum(p.numel() for p in model.parameters()) == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


def test_an_mlp_takes_other_activations_dropout_and_batchnorm() -> None:
    assert names(MLP(10, [32], 1, activation="Sigmoid")) == ["Flatten", "Linear", "Sigmoid", "Linear"]
    layers = names(MLP(4, [8], 2, dropout=0.5, batchnorm=True))
    assert layers == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert names(MLP(4, [], 2)) == ["Flatten", "Linear"]


def test_an_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of relu, .*, found 'swoosh'"):
        MLP(4, [8], 2, activation="swoosh")


def test_the_digits_network_is_small_and_takes_digits() -> None:
    model = DigitsCNN()
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
    assert 25_000 < sum(p.numel() for p in model.parameters()) < 35_000


def test_the_networks_of_the_course_have_their_sizes_and_outputs() -> None:
    probabilities = LogisticRegression()(torch.randn(5, 2))
    assert probabilities.shape == (5, 1)
    assert 0 < probabilities.min() <= probabilities.max() < 1
    log_probabilities = MnistCNN()(torch.randn(5, 1, 28, 28))
    assert torch.allclose(log_probabilities.exp().sum(1), torch.ones(5))
    assert MnistCNN().fc1.in_features == 9216
    assert Cifar10Quick()(torch.randn(5, 3, 32, 32)).shape == (5, 10)
    assert sum(p.numel() for p in Cifar10Quick().parameters()) == 145578
