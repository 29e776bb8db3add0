"""SparseCompute in training: the same as dense storage, resumable, and gone without a trace."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from doubles import assert_close, double, doubles
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import IN_PLACE, INITIAL, METHODS, SINGLE_WEIGHTS, made
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_sparsity import (
    GMP,
    NM,
    SET,
    Block,
    Columns,
    Magnitude,
    OptG,
    RigL,
    Rows,
    SparseCompute,
    StaticSparse,
)
from lightning_sparsity.core import storage as storage_module
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.storage import Storage
from lightning_sparsity.ops import compressed as ops_module
from lightning_sparsity.ops import native
from lightning_sparsity.ops.live import Formed
from lightning_sparsity.reports import storage_table
from lightning_sparsity.testing import (
    Batch,
    Batches,
    ManualModel,
    Result,
    TinyModel,
    fit,
    quiet_trainer,
    tiny_net,
)


class Told(SparseCompute):
    """Keeps what it announces; computes with torch's kernels, which are everywhere."""

    storage: Storage | None = None
    masks: Masks | None = None
    times = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"kernels": "torch", **kwargs})

    def announce(self, masks: Masks, storage: Storage) -> None:
        self.masks, self.storage = masks, storage
        self.times += 1


class Both(pl.LightningDataModule):
    """Batches to train and to validate with."""

    def train_dataloader(self) -> Batches:
        return Batches()

    def val_dataloader(self) -> Batches:
        return Batches(1)


def rigl(**options: Any) -> RigL:
    return RigL(0.3, **{"update_interval": 2, **options})


def masks_of(trainer: pl.Trainer) -> Masks:
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is not None
    return keeper.masks


def assert_plain(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Raise ``AssertionError`` unless no layer and no optimizer has anything of ours."""
    right = {name: p.shape for name, p in TinyModel().named_parameters()}
    for module in model.modules():
        assert "_plain_class" not in vars(type(module)), type(module)
        assert "_stand_ins" not in vars(module)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.shape == right[name]
        assert parameter.grad is None or parameter.grad.shape == right[name]
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                assert not isinstance(value, Tensor) or value.shape in ((), parameter.shape)
        assert not optimizer._optimizer_state_dict_post_hooks
        assert not optimizer._optimizer_load_state_dict_pre_hooks


# the same training ------------------------------------------------------------------


OFTEN = [
    name
    for name in IN_PLACE
    if name not in INITIAL
    and "update_interval" in inspect.signature(type(METHODS[name]()).__init__).parameters
]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OFTEN])
def test_masks_and_trajectory_are_those_of_dense_storage(name: str) -> None:
    dense = fit(made(name, "dense"), double, data=doubles())
    packed = fit(made(name, "csr"), double, data=doubles())
    assert len(packed.history) == 24
    assert packed.changes == dense.changes
    assert_close(packed, dense, 1e-9)


@pytest.mark.parametrize("name", OFTEN)
def test_many_updates_are_those_of_dense_storage(name: str) -> None:
    often: dict[str, Any] = {"update_interval": 1, "update_start": 2}
    if "update_end" in inspect.signature(type(METHODS[name]()).__init__).parameters:
        often["update_end"] = 20
    dense = fit(made(name, "dense", **often), double, data=doubles())
    packed = fit(made(name, "csr", **often), double, data=doubles())
    assert dense.changes >= 10 or name == "ACDC"  # its phases change the masks
    assert_close(packed, dense, 1e-9)


class First(pl.Callback):
    """Keeps what the first batch leaves behind."""

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            self.digest = masks_of(trainer).digest()
            self.weights = {k: v.clone() for k, v in model.state_dict().items()}
            self.trainer = trainer

    def on_fit_end(self, trainer: pl.Trainer, model: Any) -> None:
        self.ends_with = masks_of(trainer).digest()


@pytest.mark.parametrize("name", OFTEN)
def test_an_update_in_float32_from_an_equal_state_is_that_of_dense_storage(name: str) -> None:
    window = {"update_interval": 1, "update_start": 0}
    dense, packed = First(), First()
    for first, storage in ((dense, "dense"), (packed, "csr")):
        fit([*made(name, storage, **window), first], data=Batches(3), max_epochs=1)
    assert packed.digest == dense.digest
    for key, value in dense.weights.items():
        torch.testing.assert_close(packed.weights[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("structure", [Rows(), Columns(), Block(2, 4), NM(1, 4)], ids=repr)
@pytest.mark.parametrize("method", [RigL, SET, GMP])
def test_structures_are_those_of_dense_storage(method: Any, structure: Any) -> None:
    if method.__name__ in SINGLE_WEIGHTS:
        pytest.skip("single weights only")

    def train(*more: Any) -> Result:
        density = None if isinstance(structure, NM) else 0.5
        options = {"structure": structure, "exclude": "net.0", "update_interval": 2}
        return fit([method(density, **options), *more], double, data=doubles())

    assert_close(train(SparseCompute("csr")), train(), 1e-9)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # eps keeps noise of the last digit in gradients that should be zero from becoming steps
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, eps=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-3, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, eps=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, eps=1e-3, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_with_dense_storage(name: str) -> None:
    def model() -> TinyModel:
        return TinyModel(optimizer=OPTIMIZERS[name]).double()

    dense = fit([rigl()], model, data=doubles())
    packed = fit([rigl(), SparseCompute("csr")], model, data=doubles())
    assert dense.changes >= 8
    if name == "Rprop":  # it reads signs, also of gradients that should be zero
        assert packed.masks.keys() == dense.masks.keys()
        assert packed.live == dense.live
        return
    assert_close(packed, dense, 1e-9)


class Checkpointed(TinyModel):
    """Computes its activations a second time in the backward pass."""

    reentrant = False

    def loss(self, batch: Batch) -> Tensor:
        inputs = batch[0].requires_grad_()
        out = checkpoint(self.net, inputs, use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return nn.functional.cross_entropy(out, batch[1])


class Reentrant(Checkpointed):
    reentrant = True


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


STEPPING: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any]]] = {
    "accumulation": (lambda: TinyModel(optimizer=_adamw), {"accumulate_grad_batches": 3}),
    "clipping by norm": (TinyModel, {"gradient_clip_val": 0.05}),
    "clipping by value": (
        TinyModel,
        {"gradient_clip_val": 0.005, "gradient_clip_algorithm": "value"},
    ),
    "accumulation and clipping": (
        lambda: TinyModel(optimizer=_adamw),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ),
    "gradient checkpointing": (Checkpointed, {}),
    "reentrant checkpointing": (Reentrant, {}),
    "manual": (ManualModel, {}),
    "manual, raw": (lambda: ManualModel(raw=True), {}),
    "manual, accumulation": (lambda: ManualModel(accumulate=2, optimizer=_adamw), {}),
    "manual, raw, accumulation": (lambda: ManualModel(raw=True, accumulate=2), {}),
}


@pytest.mark.parametrize("way", STEPPING)
def test_ways_of_stepping_are_those_of_dense_storage(way: str) -> None:
    make, options = STEPPING[way]

    def train(*more: Any) -> Result:
        method = rigl(update_end=8 if "accumulation" in way else 18)
        return fit([method, *more], lambda: make().double(), data=doubles(), **options)

    dense, packed = train(), train(SparseCompute("csr"))
    assert dense.changes >= 3
    assert_close(packed, dense, 1e-9)


@pytest.mark.parametrize("kind", [TinyModel, ManualModel])
def test_bf16_autocast(kind: type[TinyModel]) -> None:
    dtypes: set[tuple[torch.dtype, torch.dtype, torch.dtype]] = set()

    class Watching(kind):  # type: ignore[valid-type, misc]
        def loss(self, batch: Batch) -> Tensor:
            given = self.net[:5](batch[0])
            out = self.net[5](given)
            held = self.net[5]._parameters["weight"]
            dtypes.add((given.dtype, out.dtype, held.dtype))
            return nn.functional.cross_entropy(self.net[6:](out), batch[1])

    result = fit([rigl(update_end=18), SparseCompute("csr")], Watching, precision="bf16-mixed")
    assert dtypes == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert result.changes >= 8
    dense = fit([rigl(update_end=18)], Watching, precision="bf16-mixed")
    for key, value in dense.weights.items():  # near, as both are near to float32
        assert (result.weights[key].float() - value.float()).abs().mean() < 0.05, key


# what stays dense, and what the table says ------------------------------------------


def reasons(model: Callable[[], pl.LightningModule], **options: Any) -> dict[str, str]:
    told = Told("csr", **options.pop("storage", {}))
    fit([StaticSparse(0.5, **options.pop("method", {})), told], model, max_steps=2, **options)
    assert told.storage is not None, "nothing was announced"
    return told.storage.reasons


def test_tied_weights_stay_dense() -> None:
    class Tied(TinyModel):
        def __init__(self) -> None:
            first, second = nn.Linear(36, 36), nn.Linear(36, 36)
            second.weight = first.weight
            super().__init__(nn.Sequential(nn.Flatten(), first, second, nn.Linear(36, 4)))

    assert reasons(Tied) == {"net.1.weight": "tied: net.1.weight, net.2.weight"}


def test_weights_in_half_precision_stay_dense() -> None:
    found = reasons(TinyModel, precision="bf16-true")
    assert found == dict.fromkeys(
        ["net.0.weight", "net.5.weight", "net.7.weight"],
        "torch has no products of compressed bfloat16 weights",
    )


def test_groups_and_transposed_convolutions_stay_dense() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ConvTranspose2d(8, 4, 2),
            nn.Flatten(),
            nn.Linear(36, 4),
        )

    assert reasons(lambda: TinyModel(net())) == {
        "net.1.weight": "its groups have a matrix each",
        "net.2.weight": "ConvTranspose2d has no product with a compressed weight",
    }


def test_frozen_weights_stay_dense() -> None:
    class Partly(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.net[5].requires_grad_(False)  # type: ignore[index]

    found = reasons(Partly, method={"include": ["net.5", "net.7"]})
    assert found == {"net.5.weight": "frozen"}


def test_weights_that_are_left_out_stay_dense() -> None:
    found = reasons(TinyModel, storage={"include": ["net.5", "net.7"], "exclude": "net.7"})
    assert found == dict.fromkeys(
        ["net.0.weight", "net.7.weight"], "left out by include= or exclude="
    )


def test_the_table() -> None:
    told = Told("csr", exclude="net.0")
    tables: list[str] = []

    class Table(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            assert told.masks is not None
            assert told.storage is not None
            tables.append(storage_table(told.masks, told.storage))

    fit([rigl(), told, Table()])
    rows = {line.split()[0]: line for line in tables[0].splitlines() if line.startswith("net")}
    assert "dense" in rows["net.0.weight"]
    assert "left out" in rows["net.0.weight"]
    assert "csr" in rows["net.5.weight"]
    assert "csr" in rows["net.7.weight"]


# resuming ---------------------------------------------------------------------------


def _saved(*callbacks: Any, folder: Path, **options: Any) -> Result:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    return fit([*callbacks, saver], enable_checkpointing=True, **options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12])
@pytest.mark.parametrize("first", ["dense", "csr"])
@pytest.mark.parametrize("name", ["RigL", "GMP"])
def test_a_training_goes_on_with_other_storage(
    name: str, first: str, step: int, tmp_path: Path
) -> None:
    then = {"dense": "csr", "csr": "dense"}[first]
    options = {"model": double, "data": doubles()}
    whole = _saved(*made(name, first), folder=tmp_path, **options)
    options["data"] = doubles()
    path = str(tmp_path / f"step={step}.ckpt")
    rest = _saved(*made(name, then), folder=tmp_path, ckpt_path=path, seed=77, **options)
    assert rest.history == whole.history[step:]
    whole.history = []
    assert_close(rest, whole, 1e-9)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_files_load_into_bare_pytorch(kind: str, tmp_path: Path) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(parameters, lr=0.01)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    result = _saved(
        rigl(),
        SparseCompute("csr"),
        folder=tmp_path,
        model=lambda: TinyModel(optimizer=optimizer),
    )
    file = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    bare = tiny_net()
    stepped = list(bare.parameters())
    bare.load_state_dict({k.removeprefix("net."): v for k, v in file["state_dict"].items()})
    theirs = optimizer(stepped)
    theirs.load_state_dict(file["optimizer_states"][0])
    for place, parameter in enumerate(stepped):
        for value in file["optimizer_states"][0]["state"][place].values():
            assert value.shape in ((), parameter.shape)
    data = Batches()
    for images, labels in data:
        theirs.zero_grad()
        nn.functional.cross_entropy(bare(images), labels).backward()
        theirs.step()
    assert result.history


def _measured(monkeypatch: pytest.MonkeyPatch, compressed: list[str]) -> list[str]:
    """Let measuring say that these weights are faster compressed; the names it is asked for."""
    asked: list[str] = []

    def measure(kept: Any, load: Any, kernels: str) -> tuple[float, float]:
        asked.append(kept.name)
        return (2.0, 1.0) if kept.name in compressed else (1.0, 2.0)

    monkeypatch.setattr(storage_module, "measure", measure)
    return asked


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12])
def test_a_resumed_training_computes_with_the_saved_choice(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _measured(monkeypatch, ["net.0.weight", "net.5.weight"])
    told = Told()
    whole = _saved(rigl(), told, folder=tmp_path)
    assert asked == ["net.0.weight", "net.5.weight", "net.7.weight"]
    assert told.storage is not None
    choices = {name: choice.compressed for name, choice in told.storage.choices.items()}
    assert choices == {"net.0.weight": True, "net.5.weight": True, "net.7.weight": False}

    asked = _measured(monkeypatch, ["net.7.weight"])  # would choose otherwise
    again = Told()
    path = str(tmp_path / f"step={step}.ckpt")
    rest = _saved(rigl(), again, folder=tmp_path, ckpt_path=path, seed=77)
    rest.assert_equal(whole)
    assert not asked
    assert again.storage is not None
    assert again.storage.choices == told.storage.choices


def test_weights_are_measured_again_when_their_density_has_halved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    densities: list[float] = []

    def measure(kept: Any, load: Any, kernels: str) -> tuple[float, float]:
        if kept.name == "net.5.weight":
            densities.append(kept.density)
        return 2.0, 1.0

    monkeypatch.setattr(storage_module, "measure", measure)
    result = fit(
        [GMP(0.05, update_interval=1, distribution={"*": 0.05}), SparseCompute(kernels="torch")]
    )
    assert result.live < 0.06 * 2184
    assert len(densities) >= 4
    assert all(b <= a / 2 for a, b in itertools.pairwise(densities))
    assert densities[-1] < 0.1


@pytest.mark.parametrize("compressed_first", [True, False])
def test_a_weight_changes_its_storage_when_that_is_faster(
    compressed_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(kept: Any, load: Any, kernels: str) -> tuple[float, float]:
        return (2.0, 1.0) if (kept.density > 0.2) == compressed_first else (1.0, 2.0)

    monkeypatch.setattr(storage_module, "measure", measure)
    kinds: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            kinds.append(masks_of(trainer)["net.5.weight"].compressed is not None)

    packed = fit(
        [GMP(0.05, update_interval=1), SparseCompute(kernels="torch"), Watch()],
        double,
        data=doubles(),
    )
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        compressed_first,
        not compressed_first,
    ]
    assert_close(packed, fit([GMP(0.05, update_interval=1)], double, data=doubles()), 1e-9)


def test_what_is_measured_is_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: dict[str, Any] = {}

    def measure(kept: Any, load: Any, kernels: str) -> tuple[float, float]:
        loads[kept.name] = load
        return 1.0, 2.0

    monkeypatch.setattr(storage_module, "measure", measure)
    fit([rigl(), SparseCompute(kernels="torch")], precision="bf16-mixed")
    assert loads["net.0.weight"].shape == (8, 1, 6, 6)
    assert loads["net.5.weight"].shape == (8, 128)
    assert not loads["net.0.weight"].needs_grad
    assert loads["net.5.weight"].needs_grad
    assert {load.autocast for load in loads.values()} == {torch.bfloat16}


def test_measuring_leaves_no_trace() -> None:
    dense = fit([rigl()], double, data=doubles())
    measured = fit([rigl(), SparseCompute(kernels="torch")], double, data=doubles())
    assert_close(measured, dense, 1e-9)


# nothing is left --------------------------------------------------------------------


class Failing(TinyModel):
    error: BaseException = RuntimeError("the user's own")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.trainer.current_epoch == 1 and batch_idx == 5:
            raise self.error
        return self.loss(batch)


class Interrupted(Failing):
    error = KeyboardInterrupt()


@pytest.mark.parametrize(
    ("kind", "error"), [(Failing, RuntimeError), (Interrupted, (KeyboardInterrupt, SystemExit))]
)
def test_an_exception_leaves_dense_weights(kind: type[TinyModel], error: Any) -> None:
    pl.seed_everything(3, verbose=False)
    model = kind()
    trainer = quiet_trainer([rigl(), SparseCompute("csr")])
    with pytest.raises(error):
        trainer.fit(model, Batches())
    assert_plain(model, trainer.optimizers)
    assert (model.net[5].weight == 0).float().mean() > 0.5  # type: ignore[index, operator]
    fit([rigl(), SparseCompute("csr")], lambda: TinyModel(model.net))


def test_after_fit_everything_is_plain() -> None:
    result = fit([rigl(), SparseCompute("csr")])
    assert_plain(result.model, result.trainer.optimizers)
    for key, mask in result.masks.items():
        parameter = result.model.get_parameter(key)
        assert torch.equal(parameter, result.weights[key])
        assert not parameter[~mask].any()
    optimizer = result.trainer.optimizers[0]
    images, labels = next(iter(Batches()))
    optimizer.zero_grad()
    nn.functional.cross_entropy(result.model.net(images), labels).backward()  # type: ignore[operator]
    optimizer.step()


def test_one_model_in_several_trainings() -> None:
    model = TinyModel()
    for callbacks in ([rigl(), SparseCompute("csr")], [rigl()], [SET(0.2), SparseCompute("csr")]):
        fit(callbacks, lambda: model)
    packed = fit([rigl(), SparseCompute("csr")], double, data=doubles())
    again = fit([rigl()], lambda: packed.model, data=doubles())
    assert_plain(again.model, again.trainer.optimizers)


def test_validation_and_test_after_fit_use_dense_weights() -> None:
    class Seen(TinyModel):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            shapes.append(tuple(self.net[5]._parameters["weight"].shape))  # type: ignore[index, union-attr]
            losses.append(float(self.loss(batch)))

    shapes: list[tuple[int, ...]] = []
    losses: list[float] = []
    result = fit([rigl(), SparseCompute("csr")], Seen, data=Both())
    assert len(shapes[-1]) == 1, "compressed as long as training goes on"
    result.trainer.validate(result.model, Batches(1), verbose=False)
    assert shapes[-1] == (16, 128)


class Copying(pl.Callback):
    """Copies the model in mid-training, in every way."""

    def __init__(self) -> None:
        self.copies: list[nn.Module] = []

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, *args: Any) -> None:
        if trainer.global_step != 13:
            return
        assert any(kept.compressed is not None for kept in masks_of(trainer))
        file = io.BytesIO()
        torch.save(model.net, file)
        file.seek(0)
        self.copies = [
            copy.deepcopy(model.net),
            copy.deepcopy(model).net,
            pickle.loads(pickle.dumps(model.net)),
            torch.load(file, weights_only=False),
        ]
        self.state = {k: v.clone() for k, v in model.net.state_dict().items()}


def test_copies_in_mid_training_are_dense_and_plain() -> None:
    copying = Copying()
    with_copies = fit([rigl(), SparseCompute("csr"), copying])
    with_copies.assert_equal(fit([rigl(), SparseCompute("csr")]))
    assert len(copying.copies) == 4
    images, labels = next(iter(Batches()))
    for net in copying.copies:
        assert [type(module) for module in net] == [type(module) for module in tiny_net()]  # type: ignore[arg-type]
        assert all(
            torch.equal(value, copying.state[key]) for key, value in net.state_dict().items()
        )
        optimizer = torch.optim.Adam(net.parameters())
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        shapes = [p.shape for p in net.parameters()]
        assert shapes == [p.shape for p in tiny_net().parameters()]


def test_weights_loaded_in_mid_training_are_taken() -> None:
    class Loading(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, model: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                state = model.state_dict()
                model.load_state_dict({k: v + 0.01 * (v.ndim > 1) for k, v in state.items()})

    dense = fit([rigl(), Loading()], double, data=doubles())
    packed = fit([rigl(), SparseCompute("csr"), Loading()], double, data=doubles())
    assert_close(packed, dense, 1e-9)


# refusals ---------------------------------------------------------------------------


def _refused(match: str, callbacks: list[Any], model: Any = TinyModel, **options: Any) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(callbacks, model, **options)


def test_it_is_given_once() -> None:
    _refused(
        "SparseCompute is given twice",
        [rigl(), SparseCompute(kernels="torch"), SparseCompute("csr")],
    )


def test_it_needs_something_sparse() -> None:
    _refused(
        "makes sparse, and there is none; add one, such as StaticSparse",
        [SparseCompute(kernels="torch")],
    )


def test_a_compiled_model_is_refused() -> None:
    model = TinyModel()
    pl.seed_everything(3, verbose=False)
    trainer = quiet_trainer([rigl(), SparseCompute(kernels="torch")])
    with pytest.raises(MisconfigurationException, match=r"SparseCompute and torch\.compile"):
        trainer.fit(torch.compile(model, backend="eager"), Batches())  # type: ignore[arg-type]


def test_a_layer_compiled_in_place_is_refused() -> None:
    def model() -> TinyModel:
        made = TinyModel()
        made.net[5].compile(backend="eager")  # type: ignore[index, operator]
        return made

    _refused(r"SparseCompute and torch\.compile", [rigl(), SparseCompute("csr")], model)


class Unknown(torch.optim.SGD):
    """An optimizer that the package has never heard of."""


@pytest.mark.parametrize("layout", ["auto", "csr"])
def test_unknown_optimizers_must_be_vouched_for(layout: Any) -> None:
    def model() -> TinyModel:
        return TinyModel(optimizer=lambda p: Unknown(p, lr=0.05, momentum=0.9)).double()

    _refused(
        r"Unknown steps net.0.weight.*elementwise=\(Unknown,\)",
        [rigl(), SparseCompute(layout)],
        model,
    )
    vouched = SparseCompute(layout, elementwise=(Unknown,))
    packed = fit([rigl(), vouched], model, data=doubles())
    assert_close(packed, fit([rigl()], model, data=doubles()), 1e-9)


def test_unknown_optimizers_may_step_what_stays_dense() -> None:
    def model() -> TinyModel:
        return TinyModel(optimizer=lambda p: Unknown(p, lr=0.05))

    fit([rigl(include="net.5"), SparseCompute("csr", exclude="net.5")], model)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"layout": "coo"}, ValueError, "layout='coo'.*'auto', which measures, or 'csr'"),
        ({"layout": None}, ValueError, "layout=None"),
        ({"contiguous": 1}, TypeError, "contiguous=1.*True or False"),
        ({"elementwise": 3}, TypeError, "elementwise=3.*optimizer classes"),
        ({"elementwise": "SGD"}, TypeError, "elementwise='SGD'.*optimizer classes"),
        ({"elementwise": (nn.Linear,)}, TypeError, "elementwise=.*optimizer classes"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^SparseCompute\({message}"):
        SparseCompute(**bad)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"include": "net.9"}, ValueError, "include='net.9' names no parameter"),
        ({"exclude": "net.99"}, ValueError, "exclude='net.99' names no parameter"),
        ({"include": 3}, TypeError, "must be a parameter name"),
    ],
)
def test_what_does_not_fit_the_model(
    bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^SparseCompute: .*{message}"):
        fit([rigl(), SparseCompute("csr", **bad)])


def test_writing_to_a_compressed_weight_is_an_error() -> None:
    class Writing(TinyModel):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.net[5].weight.mul_(0.9)  # type: ignore[index, union-attr, operator]

    with pytest.raises(RuntimeError, match=r"mul_: this weight is kept compressed.*exclude="):
        fit([rigl(), SparseCompute("csr")], Writing)
    fit([rigl(), SparseCompute("csr", exclude="net.5")], Writing)


def test_writing_to_parameters_is_seen() -> None:
    class Decaying(TinyModel):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(0.99)

    def train(*more: Any) -> Result:
        return fit([rigl(), *more], lambda: Decaying().double(), data=doubles())

    assert_close(train(SparseCompute("csr")), train(), 1e-9)


# somebody else reads the weight -----------------------------------------------------


class Attending(TinyModel):
    """Attention, whose output projection is read by a fused function."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(36, 4)

    def loss(self, batch: Batch) -> Tensor:
        given = batch[0][:, 0]
        out, _ = self.attention(given, given, given)
        return nn.functional.cross_entropy(self.last(out.flatten(1)), batch[1])


class Penalized(TinyModel):
    """A penalty that draws every weight of a layer, live or not, to a tenth."""

    def loss(self, batch: Batch) -> Tensor:
        drawn: Tensor = self.net[5].weight - 0.1  # type: ignore[index, union-attr, operator]
        return super().loss(batch) + 0.3 * drawn.square().sum() + drawn.norm()


@pytest.mark.parametrize(
    ("kind", "name"), [(Attending, "attention.out_proj.weight"), (Penalized, "net.5.weight")]
)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_whoever_reads_the_weight_sees_it_dense(
    kind: type[TinyModel], name: str, options: dict[str, Any]
) -> None:
    told = Told("csr")
    tables: list[str] = []

    class Table(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            assert told.masks is not None
            assert told.storage is not None
            tables.append(storage_table(told.masks, told.storage))

    def train(*more: Any) -> Result:
        return fit([rigl(update_end=8), *more], lambda: kind().double(), data=doubles(), **options)

    dense = train()
    packed = train(told, Table())
    assert dense.changes >= 3, "RigL grows by the gradient that the reader gave"
    assert name in packed.masks
    assert_close(packed, dense, 1e-9)
    (row,) = [line for line in tables[0].splitlines() if line.startswith(name)]
    assert "csr" in row
    assert "read densely 24 times" in row


def test_validation_may_read_it_too() -> None:
    class Reading(Attending):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.loss(batch)
            assert self.attention.out_proj.weight.shape == (6, 6)

    fit([rigl(), SparseCompute("csr")], Reading, data=Both())


@pytest.mark.parametrize("kind", [TinyModel, ManualModel, Penalized])
def test_losses_kept_with_their_graphs_do_no_harm(kind: type[TinyModel]) -> None:
    class Keeping(kind):  # type: ignore[valid-type, misc]
        def loss(self, batch: Batch) -> Tensor:
            self.kept = [*getattr(self, "kept", []), super().loss(batch)]
            return self.kept[-1]

    def train(*more: Any) -> Result:
        return fit([rigl(update_end=18), *more], lambda: Keeping().double(), data=doubles())

    dense, packed = train(), train(SparseCompute("csr"))
    assert dense.changes >= 8
    assert_close(packed, dense, 1e-9)


def test_activation_functions_may_work_in_place() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(inplace=True),
            nn.Linear(16, 16),
            nn.LeakyReLU(inplace=True),
            nn.Linear(16, 4),
        )

    def train(*more: Any) -> Result:
        return fit([rigl(), *more], lambda: TinyModel(net()).double(), data=doubles())

    assert_close(train(SparseCompute("csr")), train(), 1e-9)


@pytest.mark.parametrize("contiguous", [True, False])
def test_outputs_between_layers_lie_as_asked(contiguous: bool) -> None:
    class Own(TinyModel):
        """Calls its layers itself."""

        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.first, self.second = nn.Linear(36, 16), nn.Linear(16, 4)

        def loss(self, batch: Batch) -> Tensor:
            hidden = self.first(batch[0].flatten(1))
            lies.add(hidden.is_contiguous())
            return nn.functional.cross_entropy(self.second(hidden.relu()), batch[1])

    lies: set[bool] = set()
    told = SparseCompute("csr", contiguous=contiguous)
    packed = fit([rigl(), told], lambda: Own().double(), data=doubles())
    assert lies == {contiguous}
    assert_close(packed, fit([rigl()], lambda: Own().double(), data=doubles()), 1e-9)


# memory -----------------------------------------------------------------------------

WIDE = 1024


def wide(width: int, optimizer: Any = None) -> TinyModel:
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    )
    return TinyModel(net, optimizer or (lambda p: torch.optim.Adam(p, lr=1e-3)))


class Bytes(pl.Callback):
    """Counts what a layer keeps, and looks for large tensors that are left over."""

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, *args: Any) -> None:
        kept = masks_of(trainer)["net.3.weight"]
        assert kept.compressed is not None
        assert kept.parameter.grad is not None
        state = [
            value
            for value in trainer.optimizers[0].state[kept.parameter].values()
            if isinstance(value, Tensor)
        ]
        tensors = [kept.parameter, kept.parameter.grad, kept.mask, *state]
        self.share = (sum(t.nbytes for t in tensors) + kept.compressed.pattern.nbytes) / (
            4 * kept.numel * 4
        )
        gc.collect()
        self.large = [
            tuple(found.shape)
            for found in gc.get_objects()
            if issubclass(type(found), Tensor)
            and not isinstance(found, Formed)
            and found.is_floating_point()
            and found.numel() >= WIDE * WIDE
        ]


@pytest.mark.slow
@pytest.mark.parametrize("method", [StaticSparse, SET, RigL])
def test_memory_at_density_a_tenth(method: Any) -> None:
    counted = Bytes()
    options = {} if method is StaticSparse else {"update_interval": 1}
    fit(
        [method(0.1, distribution={"*": 0.1}, **options), SparseCompute("csr"), counted],
        lambda: wide(WIDE),
        max_steps=3,
        max_epochs=-1,
    )
    assert counted.share <= 0.30
    assert counted.large == []


class Allocations(TorchDispatchMode):
    """Follows the floating-point tensors as large as weights that operations make.

    Attributes:
        most: Bytes of the most of them that were alive at one time.
        together: Sizes of the weights whose tensors were alive at one time.
    """

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.together: set[frozenset[int]] = set()
        self.made: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, Formed) for kind in types):
            with self:  # sees what is computed inside
                return Formed.__torch_dispatch__(function, types, args, kwargs)
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if (
                isinstance(tensor, Tensor)
                and not isinstance(tensor, Formed)
                and tensor.layout == torch.strided
                and tensor.is_floating_point()
                and tensor.untyped_storage().nbytes() // tensor.element_size() in self.sizes
            ):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.made.append(str(function))
                self.alive.append((StorageWeakRef(tensor.untyped_storage()), size))
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        self.together.add(frozenset(size for _, size in self.alive))
        return out


class Following(pl.Callback):
    """Watches whole batches: forward and backward passes, steps and updates."""

    def __init__(self, sizes: set[int]) -> None:
        self.mode = Allocations(sizes)
        self._running: Any = None

    def on_train_batch_start(self, *args: Any) -> None:
        self._running = _running(self.mode)
        self._running.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self._running.__exit__(None, None, None)


@contextmanager
def _running(mode: TorchDispatchMode) -> Iterator[None]:
    with mode:
        yield


SIZES = {36 * 64, 64 * 81, 81 * 150}


def _three_layers() -> TinyModel:
    return TinyModel(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(36, 64),
            nn.ReLU(),
            nn.Linear(64, 81),
            nn.ReLU(),
            nn.Linear(81, 150),
            nn.ReLU(),
            nn.Linear(150, 4),
        )
    )


@pytest.mark.parametrize(
    "method",
    [
        lambda: [StaticSparse(0.1)],
        lambda: [SET(0.1, update_interval=2)],
        lambda: [GMP(0.1, initial_density=0.3, update_interval=2)],
        lambda: [StaticSparse(0.3), Magnitude(0.1, at=8)],
    ],
    ids=["StaticSparse", "SET", "GMP", "Magnitude"],
)
def test_no_dense_tensor_is_made(method: Callable[[], Any]) -> None:
    following = Following(SIZES)
    result = fit([*method(), SparseCompute("csr"), following], _three_layers)
    assert following.mode.made == []
    assert following.mode.together == {frozenset()}
    assert result.changes == {"StaticSparse": 0, "Magnitude": 1}.get(
        type(method()[-1]).__name__, result.changes or 1
    )


def test_rigl_forms_one_dense_gradient_at_a_time() -> None:
    following = Following(SIZES)
    fit([RigL(0.1, update_interval=2), SparseCompute("csr"), following], _three_layers)
    assert following.mode.together == {frozenset(), *(frozenset({size}) for size in SIZES)}


def test_the_watch_sees_dense_tensors() -> None:
    following = Following(SIZES)
    fit([RigL(0.1, update_interval=2), following], _three_layers)
    assert frozenset(SIZES) <= max(following.mode.together, key=len)


needs_kernels = pytest.mark.skipif(
    native.unavailable() is not None, reason="the native kernels cannot be compiled here"
)


@needs_kernels
@pytest.mark.parametrize("name", ["RigL", "SET", "GMP", "SNFS"])
def test_native_kernels_train_as_dense_storage(name: str) -> None:
    dense = fit([METHODS[name]()], double, data=doubles())
    mine = fit([METHODS[name](), SparseCompute("csr", kernels="native")], double, data=doubles())
    assert_close(mine, dense, 1e-9)


@needs_kernels
def test_native_kernels_are_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def measured(kept: Any, load: Any, kernels: str = "torch") -> tuple[float, float]:
        used.append(kernels)
        return 2.0, 1.0

    monkeypatch.setattr(storage_module, "measure", measured)
    fit([METHODS["RigL"](), SparseCompute(kernels="native")], double, data=doubles())
    assert used == ["native"] * 3


def test_kernels_that_cannot_be_compiled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "there is no C compiler.")
    with pytest.raises(MisconfigurationException, match=r"kernels='native'\): there is no C comp"):
        fit([METHODS["RigL"](), SparseCompute(kernels="native")])
    with pytest.raises(ValueError, match=r"SparseCompute\(kernels='fast'\): must be 'auto'"):
        SparseCompute(kernels="fast")


def test_what_learned_its_mask_is_compressed_when_it_is_final(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage_module, "measure", lambda *args: (2.0, 1.0))
    kinds: list[list[bool]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            masks = MaskKeeper.of(trainer).masks
            kinds.append([kept.compressed is not None for kept in masks])

    for layout in ("auto", "csr"):
        kinds.clear()
        first = RigL(0.3, update_interval=2, update_end=8)
        then = OptG(0.2, update_interval=2, update_start=8, update_end=16)
        result = fit([first, then, SparseCompute(layout), Watch()])
        assert [all(row) for row in kinds] == [True] * 7 + [False] * 8 + [True] * 9
        assert not any(any(row) for row in kinds[7:15])
        assert result.live == round(0.2 * 2184)


@pytest.mark.parametrize(
    ("compiles", "faster", "used"),
    [(True, "native", "native"), (True, "torch", "torch"), (False, "native", "torch")],
)
def test_the_faster_kernels_are_taken(
    compiles: bool, faster: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: None if compiles else "no C compiler")
    tried: list[str] = []

    def measure(kept: Any, load: Any, kernels: str) -> tuple[float, float]:
        tried.append(kernels)
        return 3.0, 1.0 if kernels == faster else 2.0

    monkeypatch.setattr(storage_module, "measure", measure)
    found: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            masks = MaskKeeper.of(trainer).masks
            found.append([(kept.compressed is not None, kept.compressed.kernels) for kept in masks])
            trainer.should_stop = True

    monkeypatch.setattr(ops_module, "native", torch_in_disguise())
    fit([METHODS["StaticSparse"](), SparseCompute(), Watch()], max_epochs=1)
    assert set(tried) == ({"torch", "native"} if compiles else {"torch"})
    assert found[0] == [(True, used)] * 3


def torch_in_disguise() -> Any:
    """Kernels that count as native and need no compiler."""

    class Kernels:
        @staticmethod
        def multiply(matrix: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
            out = matrix @ dense
            return out if bias is None else out + bias[:, None]

        @staticmethod
        def sample(matrix: Tensor, left: Tensor, dense: Tensor) -> Tensor:
            rows = matrix.to_dense() * 0 + left @ dense.t()
            return rows[places_of(matrix)]

    return Kernels


def places_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    counts = matrix.crow_indices().diff()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    return rows, matrix.col_indices().long()


class Skipping(TinyModel):
    """Steps every other batch only, and clears the gradients of the others."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=closure)
        else:
            closure()


class Adversarial(TinyModel):
    """A backward pass of its own whose gradients are cleared, before that of the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.loss(batch).backward()
        self.zero_grad()
        return self.loss(batch)


class Probing(TinyModel):
    """Asks for the gradient of its inputs alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss((images, batch[1])), images)
        return self.loss((batch[0] + 0.1 * slope.sign(), batch[1]))


@pytest.mark.parametrize("kind", [Skipping, Adversarial, Probing])
def test_rules_see_the_gradient_that_came_to_the_weight(kind: type[TinyModel]) -> None:
    dense = fit([RigL(0.3, update_interval=2)], lambda: kind().double(), data=doubles())
    mine = [RigL(0.3, update_interval=2), SparseCompute("csr")]
    assert_close(fit(mine, lambda: kind().double(), data=doubles()), dense, 1e-9)
    assert dense.changes > 2


class Standardized(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def test_a_convolution_of_its_own_stays_dense() -> None:
    def net() -> TinyModel:
        layers = [Standardized(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
        return TinyModel(nn.Sequential(*layers)).double()

    told = Told("csr")
    mine = fit([RigL(0.3, update_interval=4), told], net, data=doubles())
    assert_close(mine, fit([RigL(0.3, update_interval=4)], net, data=doubles()), 1e-9)
    assert told.storage is not None
    assert told.storage.reasons == {"net.0.weight": "Standardized has a convolution of its own"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_file_saved_before_the_first_step_of_a_resumed_training_is_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "measure", lambda *args: (2.0, 1.0))
    _saved(rigl(), Told(), folder=tmp_path)

    class SaveAtOnce(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "again.ckpt")

    path = str(tmp_path / "step=8.ckpt")
    fit([rigl(), Told(), SaveAtOnce()], ckpt_path=path)
    first, again = (
        torch.load(tmp_path / name, weights_only=True)["optimizer_states"][0]["state"]
        for name in ("step=8.ckpt", "again.ckpt")
    )
    for place, state in first.items():
        for key, tensor in state.items():
            assert torch.equal(again[place][key], tensor)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: setattr(w, "data", w * 2),
        lambda w: torch.mul(w, 2, out=w),
        lambda w: torch._foreach_mul_([w], 2),
        lambda w: next(iter(w.chunk(2))).mul_(2),
        lambda w: w.register_hook(print),
    ],
    ids=["data", "out", "foreach", "chunk", "hook"],
)
def test_what_is_written_to_a_weight_that_is_read_is_refused(write: Callable[..., Any]) -> None:
    class Writing(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                write(self.net[5].weight)
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="this weight is kept compressed"):
        fit([rigl(), SparseCompute("csr")], Writing)
