"""A pass over the model before the first step leaves training as it is, bit by bit."""

from __future__ import annotations

import functools
import multiprocessing
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_sparsity import SNIP, SynFlow
from lightning_sparsity.core import view
from lightning_sparsity.core.layer import Layers
from lightning_sparsity.core.view import ModelView, Pass
from lightning_sparsity.testing import Batch, Batches, ManualModel, Result, TinyModel, fit

Model = Callable[[], pl.LightningModule]
Data = Callable[[], Any]


class Looking(SNIP):
    """SNIP at density 1 that draws random numbers of every kind and counts its passes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(1.0, **{"mode": "train", "batches": 2, **kwargs})
        self.looks = 0

    def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Score."""
        self.looks += 1
        torch.rand(3), numpy.random.rand(3), random.random()
        return super().score(opened, layers, batches)


class AtTheEnd(Callback):
    """The next random numbers after training."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self.drawn = (torch.rand(()).item(), numpy.random.rand(), random.random())


def pictures() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(48, 1, 6, 6, generator=generator),
        torch.randint(4, (48,), generator=generator),
    )


def shuffled(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(pictures(), **{"batch_size": 8, "shuffle": True, **kwargs})


def assert_traceless(
    model: Model = TinyModel, data: Data = shuffled, look: Any = None, **trainer: Any
) -> tuple[Result, Result]:
    """Train with and without a pass; both must end in the same bits and random numbers."""
    trainer = {"max_epochs": 2, **trainer}
    ends = AtTheEnd(), AtTheEnd()
    plain = fit([ends[0]], model, data=data(), **trainer)
    looking = Looking(**(look or {}))
    looked = fit([looking, ends[1]], model, data=data(), **trainer)
    assert looking.looks == len(looked.trainer.optimizers)
    assert ends[0].drawn == ends[1].drawn
    looked.masks = {}
    looked.assert_equal(plain)
    return plain, looked


# Where the data come from ---------------------------------------------------------


def own_generator() -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(5))


def persistent() -> DataLoader[Any]:
    return shuffled(num_workers=1, persistent_workers=True)


def distributed() -> DataLoader[Any]:
    return DataLoader(pictures(), 8, sampler=DistributedSampler(pictures(), 1, 0))


@pytest.mark.parametrize(
    "data",
    [
        shuffled,
        own_generator,
        distributed,
        functools.partial(shuffled, shuffle=False),
        functools.partial(shuffled, drop_last=True, batch_size=7),
    ],
    ids=["shuffled", "own generator", "distributed", "in order", "last dropped"],
)
def test_loaders(data: Data) -> None:
    assert_traceless(data=data)


@pytest.mark.slow
@pytest.mark.parametrize("data", [persistent, functools.partial(shuffled, num_workers=2)])
def test_loaders_with_workers(data: Data) -> None:
    assert_traceless(data=data)


class Augmented(Dataset[Any]):
    """Pictures with noise from every source of random numbers there is."""

    def __init__(self) -> None:
        self.pictures = pictures()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Batch:
        noise = torch.rand(()) + float(numpy.random.rand()) + random.random()
        return self.pictures[index][0] * noise, self.pictures[index][1]


class Noise:
    """A transform with random numbers of its own."""

    def __init__(self) -> None:
        self.sources = {
            "torch": torch.Generator().manual_seed(1),
            "python": random.Random(1),
            "numpy": [numpy.random.default_rng(1), numpy.random.RandomState(1)],
        }

    def __call__(self, picture: Tensor) -> Tensor:
        noise = torch.rand((), generator=self.sources["torch"]) + self.sources["python"].random()
        return picture * (noise + sum(source.random() for source in self.sources["numpy"]))


class Transformed(Dataset[Any]):
    """Pictures that a transform changes."""

    def __init__(self, transform: Any) -> None:
        self.pictures, self.transform = pictures(), transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Batch:
        return self.transform(self.pictures[index][0]), self.pictures[index][1]


def closed_over() -> DataLoader[Any]:
    noise = Noise()
    return DataLoader(Transformed(lambda picture: noise(picture)), 8, shuffle=True)


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(Augmented(), 8, shuffle=True),
        lambda: DataLoader(Transformed(Noise()), 8, shuffle=True),
        lambda: DataLoader(Subset(Transformed(Noise()), range(32)), 8, shuffle=True),
        lambda: DataLoader(Transformed(Noise().__call__), 8, shuffle=True),
        lambda: DataLoader(Transformed(functools.partial(Noise())), 8, shuffle=True),
        closed_over,
    ],
    ids=["global", "transform", "subset", "method", "partial", "closure"],
)
def test_augmentation(data: Data) -> None:
    assert_traceless(data=data)


class Opened(Transformed):
    """A data set that opens its file at the first picture, as one does for HDF5."""

    def __init__(self) -> None:
        super().__init__(lambda picture: picture)
        self.opened = 0

    def __getitem__(self, index: int) -> Batch:
        self.opened += 1
        return super().__getitem__(index)


@pytest.mark.slow
def test_workers_read_for_the_pass_where_workers_read_for_training() -> None:
    data = Opened()
    fit([Looking()], data=DataLoader(data, 8, num_workers=1), max_epochs=1)
    assert data.opened == 0


def test_batches_given_for_scoring_alone() -> None:
    assert_traceless(data=Batches, look={"data": Batches(2)})
    assert_traceless(look={"data": DataLoader(pictures(), 4, shuffle=True)})


def augmented_by_workers() -> DataLoader[Any]:
    return DataLoader(Augmented(), 8, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize(
    "data", [own_generator, pytest.param(augmented_by_workers, marks=pytest.mark.slow)]
)
def test_the_training_loader_given_for_scoring(data: Data) -> None:
    loaders = [data() for _ in range(2)]
    plain = fit([], data=loaders[0], max_epochs=2)
    looked = fit([Looking(data=loaders[1])], data=loaders[1], max_epochs=2)
    looked.masks = {}
    looked.assert_equal(plain)


@pytest.mark.slow
def test_workers_of_a_loader_given_for_scoring_end_with_it() -> None:
    given = augmented_by_workers()
    begun: list[Any] = []

    class Watching(Callback):
        """Counts workers as training begins."""

        def on_train_batch_start(self, *args: Any) -> None:
            """Count."""
            begun.append(multiprocessing.active_children())

    fit([SNIP(0.5, data=given), Watching()], max_epochs=1)
    assert given._iterator is None
    assert begun == [[]] * 8


class Counted(DataLoader[Any]):
    """A loader that keeps books of who reads it."""

    reads = 0

    def __iter__(self) -> Any:
        self.reads += 1
        return super().__iter__()


def test_a_loader_of_another_kind_is_read_itself() -> None:
    given = Counted(pictures(), 8)
    fit([SNIP(0.5, data=given)], max_epochs=1)
    assert given.reads == 1


class Changing(pl.LightningDataModule):
    """Changes batches on their way, by random numbers of its own, and keeps books of it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.noise = torch.Generator().manual_seed(7)
        self.norm = nn.BatchNorm2d(1, affine=False)
        self.calls, self.total = 0, torch.zeros(())
        self.seen: dict[str, list[int]] = {"calls": []}

    def train_dataloader(self) -> Any:
        """Shuffled."""
        return shuffled()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Change it here."""
        return self.changed(batch) if self.where == "before" else batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Or here."""
        return self.changed(batch) if self.where == "after" else batch

    def changed(self, batch: Batch) -> Batch:
        """The batch with noise, normalized."""
        noisy = batch[0] + torch.randn(batch[0].shape, generator=self.noise, dtype=torch.float32)
        self.calls += 1
        self.total += noisy.sum()
        self.seen["calls"].append(self.calls)
        return self.norm(noisy), batch[1]

    def books(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "norm": self.norm.state_dict(),
            "calls": self.calls,
            "total": self.total,
        } | self.seen


@pytest.mark.parametrize("where", ["before", "after"])
def test_data_modules_with_a_state(where: str) -> None:
    results = assert_traceless(data=lambda: Changing(where))
    modules: list[Any] = [result.trainer.datamodule for result in results]  # type: ignore[attr-defined]
    assert [module.calls for module in modules] == [12, 12]
    torch.testing.assert_close(modules[1].books(), modules[0].books(), rtol=0, atol=0)


def test_modules_of_the_data_keep_their_precision() -> None:
    double = SynFlow(1.0, forward_fn=lambda module, batch: module.net(batch[0]))
    plain = fit([], data=Changing("after"))
    looked = fit([double], data=Changing("after"))
    looked.masks = {}
    looked.assert_equal(plain)


class Endless(IterableDataset[Any]):
    """Pictures one after the other."""

    def __iter__(self) -> Iterator[Batch]:
        data = pictures()
        return (data[i] for i in range(len(data)))


class Filtered(DataLoader[Any]):
    """A loader that does something to its batches."""

    def _get_iterator(self) -> Any:
        return super()._get_iterator()


class Labelled(TinyModel):
    """Gets a dictionary of batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the first."""
        return self.loss(batch["a"])


@pytest.mark.parametrize(
    ("data", "kind", "model"),
    [
        (lambda: DataLoader(Endless(), 8), "DataLoader", TinyModel),
        (
            lambda: DataLoader(pictures(), 8, sampler=WeightedRandomSampler([1.0] * 48, 48)),
            "DataLoader",
            TinyModel,
        ),
        (lambda: DataLoader(pictures(), batch_sampler=[[0, 1], [2, 3]]), "DataLoader", TinyModel),
        (lambda: Filtered(pictures(), 8), "Filtered", TinyModel),
        (lambda: {"a": shuffled(), "b": shuffled()}, "dict", Labelled),
        (lambda: CombinedLoader({"a": shuffled()}, "max_size"), "dict", Labelled),
        (Batches, "Batches", TinyModel),
    ],
    ids=["iterable", "sampler", "batch sampler", "subclass", "dict", "combined", "no loader"],
)
def test_data_that_cannot_be_read_twice_is_asked_for(data: Data, kind: str, model: Model) -> None:
    with pytest.raises(MisconfigurationException, match=rf"SNIP: .* is a {kind} .*give data="):
        fit([SNIP(0.5)], model, data=data())
    given = [{"a": batch} for batch in Batches(1)] if model is Labelled else Batches(1)
    if kind != "Filtered":
        assert fit([SNIP(0.5, data=given)], model, data=data(), max_epochs=1).live == 1092


def test_no_data_at_all() -> None:
    with pytest.raises(ValueError, match="data for scoring is empty"):
        fit([SNIP(0.5, data=[])])


def test_the_order_of_the_data_is_that_of_the_seed() -> None:
    class Order(SNIP):
        """Keeps the batches it saw."""

        def score(self, opened: Pass, layers: Layers, batches: Sequence[Any]) -> dict[str, Tensor]:
            """Keep."""
            self.seen = torch.cat([batch[0] for batch in batches])
            return super().score(opened, layers, batches)

    def seen(seed: int | None, run: int = 3) -> Tensor:
        order = Order(0.5, batches=2, seed=seed)
        fit([order], data=shuffled(), max_epochs=1, seed=run)
        return order.seen

    assert torch.equal(seen(1), seen(1, run=4))
    assert not torch.equal(seen(1), seen(2))
    assert not torch.equal(seen(None), seen(None, run=4))
    assert torch.equal(seen(None), seen(None))


# What the model is made of --------------------------------------------------------


def recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    class Read(nn.Module):
        """Reads a picture line by line."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(6, 8, num_layers=2, dropout=0.2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.squeeze(1))[0][:, -1])

    return Read()


class Tied(nn.Module):
    """One weight in two places, and a list of parameters on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.head = nn.Linear(36, 4)
        self.penalized = [self.first.weight, self.head.weight]

    def forward(self, x: Tensor) -> Tensor:
        """Use the list in the forward pass."""
        hidden = self.second(self.first(x.flatten(1)).relu())
        return self.head(hidden) + sum(weight.square().sum() for weight in self.penalized)


class WithBuffers(nn.Module):
    """Buffers that every pass changes: whole, in place, and not in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 4)
        self.register_buffer("mean", torch.zeros(36))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", None)
        self.register_buffer("hidden", torch.ones(36), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by what was seen."""
        x = x.flatten(1)
        self.mean = self.mean.lerp(x.mean(0).detach(), 0.1)
        self.calls += 1
        self.last = x.detach()
        self.hidden *= 0.9
        return self.fc((x - self.mean) * self.hidden) / self.calls


def parametrized(wrap: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), wrap(nn.Linear(36, 16)), nn.ReLU(), nn.Linear(16, 4))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def frozen() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    net[:2].requires_grad_(False)
    net[:2].eval()
    return net


@pytest.mark.parametrize(
    "net",
    [
        functools.partial(recurrent, nn.LSTM),
        functools.partial(recurrent, nn.GRU),
        Tied,
        WithBuffers,
        functools.partial(parametrized, parametrizations.weight_norm),
        functools.partial(parametrized, parametrizations.spectral_norm),
        functools.partial(parametrized, parametrizations.orthogonal),
        functools.partial(parametrized, old_weight_norm),
        functools.partial(parametrized, nn.utils.spectral_norm),
        frozen,
    ],
    ids=[
        "lstm",
        "gru",
        "tied",
        "buffers",
        "weight norm",
        "spectral norm",
        "orthogonal",
        "old weight norm",
        "old spectral norm",
        "frozen",
    ],
)
@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modules(net: Callable[[], nn.Module], mode: str) -> None:
    assert_traceless(lambda: TinyModel(net()), look={"mode": mode})


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_normalization_and_dropout(mode: str) -> None:
    plain, looked = assert_traceless(look={"mode": mode})
    assert plain.weights["net.1.num_batches_tracked"] == 12
    assert looked.weights["net.1.num_batches_tracked"] == 12


@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode")
def test_modes_of_modules_come_back() -> None:
    _, looked = assert_traceless(lambda: TinyModel(frozen()))
    net: Any = looked.model.net
    assert [module.training for module in net] == [False, False, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    assert_traceless(precision=precision)


def test_accumulation_and_clipping() -> None:
    assert_traceless(accumulate_grad_batches=3, gradient_clip_val=0.1)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_sanity_check_and_validation() -> None:
    class Validated(TinyModel):
        """Has a validation."""

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            """Log."""
            self.log("val", self.loss(batch))

        def val_dataloader(self) -> Any:
            """Shuffled, too."""
            return shuffled()

    plain, looked = assert_traceless(Validated, num_sanity_val_steps=1)
    assert plain.trainer.callback_metrics["val"] == looked.trainer.callback_metrics["val"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scripted_modules(mode: str) -> None:
    def model() -> TinyModel:
        scripted: Any = torch.jit.script(nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.1)))
        made = TinyModel()
        made.net.insert(1, scripted)  # type: ignore[operator]
        return made

    assert_traceless(model, look={"mode": mode})


# What training_step does besides --------------------------------------------------


class Busy(TinyModel):
    """Keeps books of every kind while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.several = torchmetrics.MetricCollection(
            {
                "p": torchmetrics.Precision("multiclass", num_classes=4, average="macro"),
                "r": torchmetrics.Recall("multiclass", num_classes=4, average="macro"),
            }
        )
        self.losses = torchmetrics.CatMetric()
        self.outputs: list[Tensor] = []
        self.recent: deque[float] = deque(maxlen=3)
        self.by_class: defaultdict[int, list[float]] = defaultdict(list)
        self.ordered: OrderedDict[str, int] = OrderedDict(steps=0)
        self.seen: Counter[int] = Counter()
        self.nested = {"a": [{"b": [0]}], "pair": (torch.zeros(2), [0])}
        self.table = numpy.zeros(4)
        self.steps, self.best = 0, None
        self.labels: set[int] = set()
        self.rng = numpy.random.default_rng(3)
        self.teacher = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))]
        self.itself: list[Any] = []
        self.itself.append(self.itself)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Write down everything."""
        logits = self.net(batch[0] * self.rng.random() + self.teacher[0](batch[0])[0, 0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.several(logits, batch[1])
        self.losses.update(loss.detach())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss}, prog_bar=True)
        if self.logger is not None:
            self.logger.log_metrics({"direct": loss.item()}, step=self.steps)
        self.outputs.append(loss.detach())
        self.recent.append(loss.item())
        for label in batch[1].tolist():
            self.by_class[label].append(loss.item())
            self.seen[label] += 1
            self.table[label] += 1
            self.labels.add(label + self.steps)
        self.ordered["steps"] += 1
        self.ordered[f"step {self.steps}"] = 1
        self.nested["a"][0]["b"].append(self.steps)  # type: ignore[index]
        self.nested["pair"][0].add_(1)  # type: ignore[union-attr]
        self.nested["pair"][1][0] += 1  # type: ignore[index, operator]
        self.steps += 1
        self.best = min(loss.item(), self.best if self.best is not None else float("inf"))
        self.late = self.steps
        if not hasattr(self.net, "extra"):
            self.net.add_module("extra", nn.Identity())
            self.net.register_forward_hook(lambda *_: None)
        return {"loss": loss, "more": logits}

    def books(self) -> dict[str, Any]:
        """All of it."""
        metrics = {
            "several": self.several.compute(),
            "losses": self.losses.compute(),
            "updates": self.several["p"]._update_count,
        }
        plain = ["outputs", "recent", "by_class", "ordered", "seen", "nested", "steps", "best"]
        rest = {name: getattr(self, name) for name in plain}
        rest["table"], rest["labels"] = self.table.tolist(), sorted(self.labels)
        rest["teacher"] = self.teacher[0].state_dict()
        rest["hooks"] = len(self.net._forward_hooks)
        return {**metrics, **rest}


def test_books_that_the_model_keeps(tmp_path: Path) -> None:
    class Started(Callback):
        """Sees the model as training begins."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, idx: int) -> None:
            """Nothing has happened."""
            if trainer.global_step == 0:
                self.attributes = set(vars(module))
                self.clean = (
                    (module.steps, module.outputs, module.best) == (0, [], None)
                    and not module.by_class
                    and not hasattr(module, "late")
                    and not hasattr(module.net, "extra")
                    and not module.net._forward_hooks
                    and module.several["p"]._update_count == 0
                    and module.itself[0] is module.itself
                    and module.recent.maxlen == 3
                    and "log" not in vars(module)
                )

    runs = []
    for callbacks in ([], [Looking()]):
        started, end = Started(), AtTheEnd()
        name = str(len(callbacks))
        result = fit(
            [*callbacks, started, end],
            Busy,
            data=shuffled(),
            max_epochs=2,
            logger=CSVLogger(tmp_path, name=name, version=""),
            log_every_n_steps=1,
        )
        assert started.clean
        rows = (tmp_path / name / "metrics.csv").read_text()
        metrics = {k: v.item() for k, v in result.trainer.callback_metrics.items()}
        result.masks = {}
        runs.append((result, end.drawn, rows, metrics, result.model.books()))
    runs[1][0].assert_equal(runs[0][0])
    assert runs[0][1:4] == runs[1][1:4]
    torch.testing.assert_close(runs[0][4], runs[1][4], rtol=0, atol=0)


class SingleArgument(TinyModel):
    """Asks for no index."""

    def training_step(self, batch: Batch) -> Tensor:  # type: ignore[override]
        """Loss."""
        return self.loss(batch)


def test_a_step_without_index() -> None:
    assert_traceless(SingleArgument)


@pytest.mark.parametrize(
    ("returned", "kind"), [(None, "NoneType"), ({"loss": None}, "NoneType"), ({}, "NoneType")]
)
def test_a_step_without_loss(returned: Any, kind: str) -> None:
    class Silent(TinyModel):
        """Gives no loss at first."""

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            """Nothing."""
            return returned

    with pytest.raises(MisconfigurationException, match=rf"SNIP: .* {kind}, .*give loss_fn="):
        fit([SNIP(0.5)], Silent, data=shuffled())


def loss_of(module: Any, batch: Batch) -> Tensor:
    return module.loss(batch)


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization_asks_for_the_loss(raw: bool) -> None:
    with pytest.raises(MisconfigurationException, match="SNIP: .*give loss_fn="):
        fit([SNIP(0.5)], functools.partial(ManualModel, raw=raw), data=shuffled())
    assert_traceless(functools.partial(ManualModel, raw=raw), look={"loss_fn": loss_of})


# The machinery --------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_net_is_not_compiled_again() -> None:
    counters = torch._dynamo.utils.counters

    def model() -> TinyModel:
        made = TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Linear(16, 4)))
        made.net = torch.compile(made.net, backend="aot_eager")  # type: ignore[assignment]
        return made

    found = []
    for callbacks in ([], [Looking()]):
        torch._dynamo.reset()
        counters.clear()
        result = fit([*callbacks], model, data=shuffled(), max_epochs=2)
        result.masks = {}
        found.append((result, dict(counters["stats"]), dict(counters["recompile_limit"])))
    found[1][0].assert_equal(found[0][0])
    assert found[0][1]["unique_graphs"] == 1
    assert found[0][1:] == found[1][1:]


class Wrong(Exception):
    """Something of the user's."""


@pytest.mark.parametrize("where", ["loss", "inside"])
def test_an_exception_leaves_no_trace_either(where: str) -> None:
    pl.seed_everything(3, verbose=False)
    module = Busy()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = {m: dict(vars(m)) for m in module.modules()}
    modes = [m.training for m in module.modules()]
    states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def failing(module: Any, batch: Batch) -> Tensor:
        """Change everything, then fail."""
        module.training_step(batch, 0)
        torch.rand(3), numpy.random.rand(3), random.random()
        raise Wrong

    def look() -> None:
        """Fail in a pass."""
        with ModelView(trainer, module).open([], mode="eval") as opened:
            for weight in opened.weights.values():
                weight.detach().add_(1)
            if where == "inside":
                raise Wrong
            opened.loss(next(iter(Batches(1))), failing)

    with pytest.raises(Wrong):
        look()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for inner, kept in attributes.items():
        assert vars(inner).keys() == kept.keys()
        assert all(vars(inner)[key] is value for key, value in kept.items())
    assert [m.training for m in module.modules()] == modes
    assert (module.steps, module.outputs, module.by_class) == (0, [], {})
    now = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(now[0], states[0])
    assert now[1:] == states[1:]
    assert torch.is_grad_enabled()


def test_gradients_that_are_there_stay() -> None:
    module = TinyModel()
    module.loss(next(iter(Batches(1)))).backward()
    grads = [p.grad for p in module.parameters()]
    values = [grad.clone() for grad in grads if grad is not None]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with ModelView(trainer, module).open([]) as opened:
        opened.gradients(list(opened.weights), list(Batches(2)), loss_of)
        opened.loss(next(iter(Batches(1))), loss_of).backward()
    assert all(p.grad is grad for p, grad in zip(module.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, values, strict=True))


def test_numbers_drawn_inside_are_those_of_the_seed() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def drawn(seed: int) -> tuple[float, ...]:
        with ModelView(trainer, TinyModel()).open([], seed=seed):
            return torch.rand(()).item(), numpy.random.rand(), random.random()

    first, other = drawn(2**40), drawn(2)
    assert drawn(2**40) == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_new_tensors_have_the_type_of_the_pass() -> None:
    class Made(TinyModel):
        """Makes tensors of its own."""

        def loss(self, batch: Batch) -> Tensor:
            """Noise from nowhere."""
            return super().loss((torch.randn(8, 1, 6, 6), batch[1]))

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with ModelView(trainer, Made()).open([], dtype=torch.float64) as opened:
        assert opened.loss(next(iter(Batches(1))), loss_of).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


# Long passes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "options", "shown"),
    [
        (0, {"enable_progress_bar": True}, True),
        (0, {}, False),
        (9, {"enable_progress_bar": True}, False),
    ],
)
def test_a_progress_bar_for_long_passes(
    patience: float, options: Any, shown: bool, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(view, "_PATIENCE", patience)
    fit([SNIP(0.5, batches=3)], data=shuffled(), max_epochs=1, **options)
    assert ("data for scoring" in capsys.readouterr().out) is shown


# Several processes ----------------------------------------------------------------

SCRIPT = """
import functools, os
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_sparsity import SNIP, SynFlow
from lightning_sparsity.testing import TinyModel, fit

torch.set_num_threads(1)


class Seen(SNIP):
    def score(self, opened, layers, batches):
        self.seen = torch.cat([batch[0].flatten(1).sum(1) for batch in batches])
        return super().score(opened, layers, batches)


def model(net):
    # As without seed_everything: every process has a seed of its own.
    pl.seed_everything(3 + int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
    return TinyModel(net())


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4))


def with_dropout():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Dropout(0.2), nn.Linear(36, 4))


def run(callbacks, net, size=4, data=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    pictures = TensorDataset(
        torch.randn(64, 1, 6, 6, generator=generator), torch.randint(4, (64,), generator=generator)
    )
    loader = DataLoader(pictures, batch_size=size, shuffle=True)
    return fit(callbacks, functools.partial(model, net), data=loader, max_epochs=2, **kwargs)


two = {"strategy": "ddp", "devices": 2}
method = Seen(0.2, batches=2, mode="train")
found = run([method], plain, **two)
both = [None, None]
mine = (found.masks, method.seen.tolist())
torch.distributed.all_gather_object(both, mine)
(masks, first), (others, second) = both
assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
assert len(first) == len(second) == 8 and not set(first) & set(second), (first, second)

quiet = run([], with_dropout, **two)
looked = run([SNIP(1.0, batches=2, mode="train")], with_dropout, **two)
looked.masks = {}
looked.assert_equal(quiet)
rank = torch.distributed.get_rank()
torch.distributed.destroy_process_group()
if rank == 0:
    alone = Seen(0.2, batches=2, mode="train")
    whole = run([alone], plain, size=8)
    assert set(alone.seen.tolist()) == set(first) | set(second)
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in masks.items())
    print("RESULT", whole.live, flush=True)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_score_what_one_would(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"RESULT {round(0.2 * (36 * 32 + 32 * 4))}" in done.stdout
