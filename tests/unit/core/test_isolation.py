"""What isolation finds, and what it puts back."""

import dataclasses
import functools
import random
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from lightning_sparsity.core.isolation import isolated, within_reach


def reaches(root, target):
    return any(found is target for found in within_reach([root]))


@dataclasses.dataclass
class Holder:
    held: object

    def use(self):
        return self.held


@pytest.mark.parametrize(
    "hide",
    [
        lambda x: [{"a": (x,)}],
        Holder,
        lambda x: Holder([Holder(x)]),
        lambda x: Holder(x).use,
        lambda x: lambda: x,
        lambda x: functools.partial(print, x),
        lambda x: functools.partial(print, end=x),
        lambda x: SimpleNamespace(x=x),
        lambda x: nn.Sequential(nn.Linear(1, 1), nn.ModuleDict({"a": Holding(x)})),
    ],
)
def test_what_is_within_reach(hide):
    assert reaches(hide(target := random.Random()), target)
    assert reaches(hide(target := nn.Linear(1, 1)), target)


class Holding(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.books = [held]


def test_what_is_out_of_reach():
    target = random.Random()
    assert not reaches([target] * 1001, target), "long containers are data"
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.held = target
    assert not reaches(Holder(trainer), target)

    def later():
        return unset

    assert not reaches(later, target), "an empty closure"
    unset = 1
    assert later() == unset


def test_circles_end():
    circle = Holder(None)
    circle.held = [circle]
    assert len(within_reach([circle])) == 2


class Counting(Dataset):
    def __init__(self):
        self.read, self.rng = 0, None

    def __getitem__(self, index):
        self.read += 1
        self.rng = self.rng or numpy.random.default_rng(0)
        return self.rng.random()


def test_data_sets_have_their_attributes_back():
    data = ConcatDataset([TensorDataset(torch.zeros(2))])
    data.datasets.append(counting := Counting())
    with isolated(nn.Linear(1, 1), [data], dtype=torch.float32, seed=0):
        counting[0]
        assert counting.read == 1
    assert (counting.read, counting.rng) == (0, None)


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.images, self.paths = torch.zeros(1_000_001), list(range(1001))
        self.mean, self.books, self.steps = torch.zeros(3), {"seen": []}, 0
        self.held = {"images": self.images, "norm": nn.BatchNorm1d(3)}


def test_data_modules_have_their_attributes_back():
    data = Data()
    before = dict(vars(data))
    with isolated(nn.Linear(1, 1), [data], dtype=torch.float64, seed=0):
        assert data.images is before["images"], "that is data"
        assert data.paths is before["paths"]
        assert data.held["images"] is data.images
        assert data.mean.dtype == torch.float32
        assert data.held["norm"].running_mean.dtype == torch.float32
        data.mean += 1
        data.held["norm"].running_mean += 1
        data.books["seen"].append(1)
        data.steps, data.late = 1, True
    assert vars(data).keys() == before.keys()
    assert all(vars(data)[key] is value for key, value in before.items())
    assert not data.mean.any()
    assert not data.held["norm"].running_mean.any()
    assert data.books == {"seen": []}


def test_what_model_and_data_share_is_of_the_model():
    data, model = Data(), Holding(None)
    model.shared = data.shared = torch.zeros(2)
    model.norm = data.held["norm"]
    with isolated(model, data, dtype=torch.float64, seed=0):
        assert model.shared is data.shared
        assert model.shared.dtype == model.norm.running_mean.dtype == torch.float64


def test_parts_are_copied_once():
    model = Holding(None)
    model.fc, model.views = nn.Linear(2, 2), {}
    model.views["pair"] = (model.fc.weight, model.fc)
    model.views["again"] = model.views
    original = model.fc.weight
    with isolated(model, None, dtype=torch.float64, seed=0):
        assert model.fc.weight is not original
        assert model.fc.weight.dtype == torch.float64
        assert model.views["pair"][0] is model.fc.weight
        assert model.views["pair"][1] is model.fc, "modules stay themselves"
        assert model.views["again"] is model.views
        with torch.no_grad():
            model.fc.weight.fill_(3)
    assert model.fc.weight is original
    assert not (original == 3).any()


def test_seeds_of_every_kind():
    model = nn.Linear(1, 1)

    def draw():
        return torch.rand(()).item(), numpy.random.rand(), random.random()

    def inside(seed):
        with isolated(model, None, dtype=torch.float32, seed=seed):
            return draw()

    assert inside(2**40 + 1) == inside(2**40 + 1)
    assert all(a != b for a, b in zip(inside(1), inside(2), strict=True))
    torch.manual_seed(0), numpy.random.seed(0), random.seed(0)
    first = draw()
    torch.manual_seed(0), numpy.random.seed(0), random.seed(0)
    inside(1)
    assert draw() == first


@pytest.mark.parametrize(
    "kind",
    [
        lambda: torch.Generator().manual_seed(1),
        lambda: random.Random(1),
        lambda: numpy.random.default_rng(1),
        lambda: numpy.random.RandomState(1),
    ],
)
@pytest.mark.parametrize("place", ["model", "data"])
def test_generators_of_every_kind(kind, place):
    def draw(source):
        if isinstance(source, torch.Generator):
            return torch.rand((), generator=source).item()
        return source.random()

    source, expected = kind(), draw(kind())
    model = Holding(source if place == "model" else None)
    with isolated(model, source if place == "data" else None, dtype=torch.float32, seed=0):
        assert draw(source) == expected
    assert draw(source) == expected
