"""What users do with a Trainer, over every public mask method."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from doubles import doubles
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import (
    DENSE_GRADIENTS,
    INITIAL,
    LEARN_TO_THE_END,
    LEARNED,
    LINEAR_ONLY,
    METHODS,
    UPDATERS,
    expected_live,
    made,
    stored,
)
from torch import Tensor, nn

from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import (
    Batch,
    Batches,
    ManualModel,
    Probe,
    TinyModel,
    assert_zero_off_masks,
    fit,
    quiet_trainer,
    tiny_net,
)

# Their scores have no random choice; dropout is one of the others'.
SCORED_IN_EVAL = ["SNIP", "SNIPit", "SNAPit", "SynFlow", "NeuralTangentTransfer"]

pytestmark = pytest.mark.parametrize(("name", "storage"), stored(METHODS, ["RigL"]))


class Validated(TinyModel):
    """Counts the zeros that validation sees."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[int] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append(zeros(self))


def zeros(module: nn.Module) -> int:
    weights = [getattr(m, "weight", None) for m in module.modules()]
    return sum(int((w == 0).sum()) for w in weights if w is not None and w.ndim > 1)


def off(result: Any) -> int:
    return sum(int((~mask).sum()) for mask in result.masks.values())


def test_tied_weights_are_masked_once(name: str, storage: str) -> None:
    class Tied(TinyModel):
        def __init__(self) -> None:
            first, second = nn.Linear(36, 36), nn.Linear(36, 36)
            second.weight = first.weight
            super().__init__(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second))

    result = fit(made(name, storage), Tied)
    assert list(result.masks) == ["net.1.weight"]
    assert result.live == expected_live(name, 0.3, result.masks)
    assert torch.equal(result.weights["net.1.weight"], result.weights["net.3.weight"])
    assert not result.weights["net.3.weight"][~result.masks["net.1.weight"]].any()


def test_averaged_weights_are_sparse_too(name: str, storage: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    average = EMAWeightAveraging(decay=0.9)
    module = Validated()
    if storage == "csr":
        with pytest.raises(MisconfigurationException, match="SparseCompute and EMAWeightAveragi"):
            fit([*made(name, storage), average], lambda: module, data=_with_validation())
        return
    result = fit(
        [*made(name, storage), average, saver],
        lambda: module,
        enable_checkpointing=True,
        check_val_every_n_epoch=1,
        data=_with_validation(),
    )
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    for key, mask in result.masks.items():
        assert not result.weights[key][~mask].any()
        assert not file["state_dict"][key][~mask].any()
    assert module.seen[-1] >= off(result)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging(name: str, storage: str) -> None:
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    if storage == "csr":
        with pytest.raises(MisconfigurationException, match="SparseCompute and StochasticWeight"):
            fit([*made(name, storage), swa])
        return
    result = fit([*made(name, storage), swa], lambda: TinyModel(net=_without_batch_norm()))
    for key, mask in result.masks.items():
        assert not result.weights[key][~mask].any()


def test_compiled_inner_network(name: str, storage: str) -> None:
    def compiled() -> TinyModel:
        model = TinyModel()
        model.net = torch.compile(model.net, backend="aot_eager")  # type: ignore[assignment]
        return model

    if storage == "csr":
        with pytest.raises(MisconfigurationException, match=r"SparseCompute and torch\.compile"):
            fit(made(name, storage), compiled)
        return
    if METHODS[name]().statistics:
        with pytest.raises(MisconfigurationException, match="net.0.weight, which is inside a comp"):
            fit(made(name, storage), compiled)
        return
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = fit(made(name, storage), compiled)
    eager = fit(made(name, storage))
    names = ["net.0.weight", "net.5.weight", "net.7.weight"][name in LINEAR_ONLY :]
    assert list(result.masks) == list(eager.masks) == names
    assert result.live == eager.live
    # of layers: with effective weights, and with their own where learning ends before training
    kinds = 1 + (name in LEARNED and name not in LEARN_TO_THE_END)
    assert torch._dynamo.utils.counters["frames"]["ok"] == kinds, "recompiled at a mask update"


def test_learning_rate_finder_leaves_the_masks_alone(
    name: str, storage: str, tmp_path: Path
) -> None:
    class WithLr(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    finder = LearningRateFinder(num_training_steps=8, update_attr=False)
    finder._early_exit = False
    found = fit([*made(name, storage), finder], WithLr, default_root_dir=tmp_path)
    assert found.live == expected_live(name, 0.3, found.masks)
    assert len(found.history) >= 24


def test_fit_twice_with_one_trainer_goes_on(name: str, storage: str) -> None:
    pl.seed_everything(3, verbose=False)
    probe = Probe()
    trainer = quiet_trainer([*made(name, storage), probe], max_epochs=2)
    model = TinyModel()
    if name == "LotteryTicket":  # its rounds fill the training, which cannot be longer
        with pytest.raises(MisconfigurationException, match="max_epochs=3"):
            trainer.fit(model, Batches())
        return
    trainer.fit(model, Batches())
    first = dict(probe.masks)
    seen = len(probe.history)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, Batches())
    assert len(probe.history) == seen + 8
    if name in (*INITIAL, "Magnitude"):
        assert all(torch.equal(first[key], probe.masks[key]) for key in first)
    live = sum(int(mask.sum()) for mask in probe.masks.values())
    assert live == expected_live(name, 0.3, probe.masks)


def test_one_callback_in_two_trainers(name: str, storage: str) -> None:
    callbacks = made(name, storage)
    first = fit(callbacks)
    second = fit(callbacks)
    second.assert_equal(first)
    assert second.history == first.history


@pytest.mark.parametrize("fitted", [False, True])
def test_pickling(name: str, storage: str, fitted: bool) -> None:
    callbacks = made(name, storage)
    if fitted:
        fit(callbacks)
    data = pickle.dumps(callbacks)
    assert len(data) < 5000, "no module or Trainer comes along"
    copy = pickle.loads(data)
    fit(copy).assert_equal(fit(made(name, storage)))


def test_several_optimizers_share_the_budget_by_size(name: str, storage: str) -> None:
    result = fit(made(name, storage, **_in_steps(name)), ManualModel)
    if name in LINEAR_ONLY:  # one of the optimizers has no such layer
        assert result.live == round(0.3 * 2112)
        return
    parts = [["net.0.weight"], ["net.5.weight", "net.7.weight"]]
    assert result.live == expected_live(name, 0.3, result.masks, parts)
    alone = {"net.0.weight": result.masks["net.0.weight"]}
    assert int(alone["net.0.weight"].sum()) == expected_live(name, 0.3, alone)


def test_grouped_and_transposed_convolutions(name: str, storage: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.ConvTranspose2d(8, 4, 2, groups=2),
            nn.Conv2d(4, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    if name in LINEAR_ONLY:
        with pytest.raises(ValueError, match=f"^{name}: net.0.weight .* linear layers"):
            fit(made(name, storage, include=nn.Module), lambda: TinyModel(net()))
        return
    result = fit(made(name, storage), lambda: TinyModel(net()))
    layouts = {"net.1.weight": Layout(groups=4), "net.2.weight": Layout(groups=2, transposed=True)}
    assert result.live == expected_live(name, 0.3, result.masks, layouts=layouts)
    assert len(result.masks) == 4


def test_channels_last_and_double(name: str, storage: str) -> None:
    def model() -> TinyModel:
        return TinyModel().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    last = fit(made(name, storage), model)
    first = fit(made(name, storage))
    assert last.live == first.live
    # the gradients of RigL differ in the last bit between the two formats
    if name not in ("RigL", *LINEAR_ONLY):
        assert all(torch.equal(last.masks[k], first.masks[k]) for k in ("net.0.weight",))
    double = fit(made(name, storage), precision="64-true", data=doubles())
    assert double.live == first.live


@pytest.mark.filterwarnings("ignore:.*. frozen.weight got no gradient")
def test_unused_and_frozen_parameters(name: str, storage: str) -> None:
    class Partly(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(8, 8)
            self.frozen.requires_grad_(False)

    result = fit(made(name, storage), Partly)
    assert "frozen.weight" not in result.masks
    named = fit(made(name, storage, include=["frozen", "net.5"]), Partly)
    assert list(named.masks) == ["net.5.weight", "frozen.weight"]
    if name in ("GraNet", "NeST"):  # what has no gradient stays as it started
        del named.masks["frozen.weight"]
    assert named.live == expected_live(name, 0.3, named.masks)


def test_layers_made_late(name: str, storage: str) -> None:
    class Late(TinyModel):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.net, nn.Identity):
                self.net = tiny_net()

    result = fit(made(name, storage), Late)
    assert len(result.masks) == 3 - (name in LINEAR_ONLY)
    assert result.live == expected_live(name, 0.3, result.masks)


def test_nothing_is_left_after_an_exception(name: str, storage: str) -> None:
    class Failing(TinyModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if batch_idx == 5:
                raise RuntimeError("the user's own")
            return self.loss(batch)

    pl.seed_everything(3, verbose=False)
    trainer = quiet_trainer(made(name, storage))
    module = Failing()
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.fit(module, Batches())
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is None
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # type: ignore[attr-defined]


@pytest.mark.parametrize("fast_dev_run", [1, 2])
def test_fast_dev_run(name: str, storage: str, fast_dev_run: int) -> None:
    fit(made(name, storage), fast_dev_run=fast_dev_run)


def test_lbfgs_is_refused(name: str, storage: str) -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="LBFGS"):
        fit(made(name, storage), lambda: TinyModel(optimizer=torch.optim.LBFGS))


def test_rng_is_untouched(name: str, storage: str) -> None:
    states: list[Tensor] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            states.append(torch.get_rng_state())

    fit([*made(name, storage), Recorder()])
    with_method, states = states, []
    fit([Recorder()])
    assert all(torch.equal(a, b) for a, b in zip(with_method, states, strict=True))


def test_other_seed_other_masks(name: str, storage: str) -> None:
    first, again = fit(made(name, storage, seed=1)), fit(made(name, storage, seed=1))
    other = fit(made(name, storage, seed=2))
    again.assert_equal(first)
    same = all(torch.equal(first.masks[k], other.masks[k]) for k in first.masks)
    by_rank = {
        "GMP",
        "GSM",
        "Magnitude",
        "ACDC",
        "DSD",
        "IHT",
        "LotteryTicket",
        *LEARNED,
        *SCORED_IN_EVAL,
    }
    assert same == (name in by_rank - {"EdgePopup"})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validate_and_test_from_a_checkpoint(name: str, storage: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    result = fit([*made(name, storage), saver], enable_checkpointing=True)
    for callbacks in (made(name, storage), []):
        module = Validated()
        trainer = quiet_trainer(callbacks)
        trainer.validate(module, Batches(), ckpt_path=tmp_path / "end.ckpt")
        assert module.seen[0] >= off(result)


def test_zero_gradients_off_the_mask_reach_clipping(name: str, storage: str) -> None:
    norms: list[Tensor] = []

    class Clipping(TinyModel):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            keeper = MaskKeeper.of(self.trainer)
            assert keeper is not None
            assert keeper.masks is not None
            for kept in keeper.masks:
                grad = kept.parameter.grad
                if kept.compressed is not None:
                    assert grad is not None
                    assert grad.shape == (kept.live,)
                elif name == "EdgePopup" and kept.effective is not None:
                    assert grad is None, "its weights are frozen"
                elif name in DENSE_GRADIENTS and not kept.is_dense:
                    assert grad[~kept.mask].any(), "weights off the mask learn nothing"  # type: ignore[index]
                else:
                    assert not grad[~kept.mask].any()  # type: ignore[index]
            norms.append(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1))

    fit(made(name, storage), Clipping)
    assert len(norms) == 24


def test_weights_moved_between_steps_do_not_reach_validation(name: str, storage: str) -> None:
    if name not in UPDATERS:
        pytest.skip("same engine path")

    class Noisy(Validated):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(0.001)

    module = Noisy()
    callback = Check()
    fit([*made(name, storage), callback], lambda: module, data=_with_validation())
    assert callback.checked == 3


class Check(pl.Callback):
    """Looks at the weights when validation runs."""

    checked = 0

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        if keeper is not None and keeper.masks is not None and not trainer.sanity_checking:
            assert_zero_off_masks(keeper.masks)
            self.checked += 1


def _in_steps(name: str) -> dict[str, Any]:
    return {"at": 3} if name == "Magnitude" else {}


def _without_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


class _Data(pl.LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches()

    def val_dataloader(self) -> Batches:
        return Batches(count=1)


def _with_validation() -> Callable[..., Any]:
    return _Data()  # type: ignore[return-value]
