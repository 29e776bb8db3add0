"""What users do to the engine that it did not ask for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_sparsity import (
    GMP,
    NM,
    SET,
    DensityMonitor,
    Magnitude,
    MaskCallback,
    RigL,
    Rows,
    StaticSparse,
    Unstructured,
    uniform,
)
from lightning_sparsity.core.apportion import apportion, fill
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Budget, Layers
from lightning_sparsity.rules import drop
from lightning_sparsity.scores import random
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import (
    Batch,
    Batches,
    ManualModel,
    Probe,
    Result,
    TinyModel,
    assert_zero_off_masks,
    fit,
    quiet_trainer,
    sgd,
)

NUMEL = 8 * 9 + 128 * 16 + 16 * 4
SIZES = {"net.0.weight": 72, "net.5.weight": 2048, "net.7.weight": 64}


def totals(result: Result) -> list[int]:
    """Live weights after every batch."""
    return [sum(live.values()) for _, live in result.history]


def moves(result: Result) -> list[int]:
    """Batches, counted from 1, that ended with other masks than the one before."""
    digests = [digest for digest, _ in result.history]
    return [i + 1 for i in range(1, len(digests)) if digests[i] != digests[i - 1]]


# Budgets --------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.3, 0.1, 0.25])
def test_a_hand_over_keeps_the_budget_of_all_optimizers_together(density: float) -> None:
    # 21.6 of 72 and 633.6 of 2112: each rounded by itself makes one too many.
    first = RigL(0.5, update_interval=2, update_end=4)
    second = GMP(density, update_interval=2, update_start=4, update_end=8)
    result = fit([first, second], ManualModel)
    assert totals(result)[0] == round(0.5 * NUMEL)
    assert result.live == round(density * NUMEL)


def test_a_density_given_at_a_hand_over_holds_over_all_optimizers() -> None:
    first = SET(0.5, update_interval=2, update_end=4)
    second = RigL(0.3, update_interval=2, update_start=4, update_end=8)
    assert totals(fit([first, second], ManualModel))[4:] == [round(0.3 * NUMEL)] * 20


def test_a_ramp_of_densities_by_pattern_is_a_ramp() -> None:
    by_name = {"net.0*": 0.5, "net.5*": 0.1, "net.7*": 1.0}
    end = {name: round(by_name[f"{name[:5]}*"] * size) for name, size in SIZES.items()}
    result = fit([GMP(distribution=by_name, update_interval=4)])
    counts = [live for _, live in result.history]
    assert counts[0] == SIZES, "nothing is pruned before the first update"
    assert totals(result) == sorted(totals(result), reverse=True)
    assert counts[11] not in (SIZES, end)
    assert counts[-1] == end


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_later_prune_by_pattern_waits_for_its_time(density: float | None) -> None:
    result = fit([Magnitude(density, at=12, distribution={"*": 0.3})])
    assert set(totals(result)[:11]) == {NUMEL}
    end = {name: round(0.3 * size) for name, size in SIZES.items()}
    assert [live for _, live in result.history[11:]] == [end] * 13


def test_found_budgets_scale_in_proportion_where_one_layer_is_full() -> None:
    found = {"net.0.weight": 72, "net.5.weight": 102, "net.7.weight": 3}
    start = StaticSparse(distribution={"net.0*": 1.0, "net.*": 0.05})
    more = fit([start, RigL(0.25, update_interval=4)])
    total = round(0.25 * NUMEL)
    capacity = list(SIZES.values())
    wanted = apportion(fill(list(found.values()), capacity, total), capacity, total)
    assert list(more.history[0][1].values()) == wanted == [72, 460, 14]


def test_gmp_refuses_to_prune_up() -> None:
    with pytest.raises(
        (ValueError, MisconfigurationException), match=r"GMP.*0\.3.*StaticSparse.*0\.1"
    ):
        fit([StaticSparse(0.1), GMP(0.3, update_interval=4)])


# Structures -----------------------------------------------------------------------


def test_zeros_of_a_file_are_read_in_whole_units() -> None:
    def half_zero() -> TinyModel:
        model = TinyModel()
        with torch.no_grad():
            for i, size in ((0, 8), (5, 16), (7, 4)):
                weight = model.net[i].weight  # type: ignore[index, union-attr]
                weight[: size // 2] = 0.0
                weight[size // 2 :].view(size // 2, -1)[:, 0] = 0.0  # but these rows live
        return model

    result = fit([StaticSparse(structure=Rows())], half_zero)
    for mask in result.masks.values():
        half = len(mask) // 2
        assert not mask[:half].any()
        assert mask[half:].all()


def test_signs_and_units_do_not_go_together_however_they_meet() -> None:
    with pytest.raises(
        (ValueError, MisconfigurationException), match=r"SET.*single weights only.*Rows"
    ):
        fit([StaticSparse(0.5, structure=Rows()), SET(sign_split=True)])


def test_single_weights_have_signs() -> None:
    SET(0.3, sign_split=True, structure=Unstructured())


def test_one_method_over_layers_of_several_structures() -> None:
    result = fit(
        [
            StaticSparse(structure=NM(2, 4), include="net.5"),
            StaticSparse(0.5, structure=Rows(), include="net.0"),
            StaticSparse(0.25, include="net.7"),
            RigL(update_interval=4),
        ]
    )
    assert {tuple(live.values()) for _, live in result.history} == {(36, 1024, 16)}
    assert (NM(2, 4).group(result.masks["net.5.weight"], Layout()).sum(1) == 2).all()
    rows = result.masks["net.0.weight"].view(8, 9).sum(1)
    assert sorted(rows.tolist()) == [0] * 4 + [9] * 4
    assert result.changes > 0


# Others write to weights ----------------------------------------------------------


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)


def by_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.add_(0.01)


def by_new_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.01


def by_vector(module: nn.Module) -> None:
    vector = parameters_to_vector(module.parameters()).detach()
    vector_to_parameters(vector + 0.01, module.parameters())


@pytest.mark.parametrize("write", [in_place, by_new_data, by_vector])
@pytest.mark.parametrize("method", [StaticSparse, RigL])
@pytest.mark.filterwarnings("ignore:RigL makes no update")
def test_weights_written_between_steps(write: Callable[..., None], method: Any) -> None:
    class Writer(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            write(module)

    # The probe inside ``fit`` looks after the step.
    assert fit([method(0.3), Writer()], max_epochs=1).live == round(0.3 * NUMEL)


def test_writes_that_leave_no_trace_end_before_validation_and_saving(tmp_path: Path) -> None:
    class Writer(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.is_last_batch:
                by_data(module)

    class Looking(TinyModel):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            keeper = MaskKeeper.of(self.trainer)
            assert keeper is not None
            assert keeper.masks is not None
            if not self.trainer.sanity_checking:
                assert_zero_off_masks(keeper.masks)

        def val_dataloader(self) -> Batches:
            return Batches(count=1)

    # The writer stands after the probe, which looks after every batch.
    probe = Probe()
    trainer = quiet_trainer([StaticSparse(0.3), probe, Writer()], max_epochs=1)
    trainer.fit(Looking(), Batches())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    for name, mask in probe.masks.items():
        assert not file[name][~mask].any()


def test_a_step_hook_of_the_user() -> None:
    class Hooked(TinyModel):
        def configure_optimizers(self) -> Optimizer:
            optimizer = sgd(self.parameters())
            optimizer.register_step_post_hook(lambda *_: in_place(self))
            return optimizer

    assert fit([StaticSparse(0.3)], Hooked, max_epochs=1).live == round(0.3 * NUMEL)


def test_gradients_written_after_the_masking() -> None:
    class Noisy(TinyModel):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(0.01)

    assert fit([RigL(0.3, update_interval=4)], Noisy).live == round(0.3 * NUMEL)


def test_an_optimizer_that_divides_zero_by_zero() -> None:
    def without_eps(parameters: Any) -> Optimizer:
        return torch.optim.Adam(parameters, lr=0.01, eps=0.0)

    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))
    result = fit([RigL(0.5, update_interval=4)], lambda: TinyModel(net, without_eps))
    for name, mask in result.masks.items():
        assert torch.isfinite(result.weights[name][~mask]).all()


# Optimizers that come, go and share -----------------------------------------------


class Unfrozen(TinyModel):
    """The optimizer gets the middle layer after the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[5].requires_grad_(False)  # type: ignore[index, union-attr]

    def configure_optimizers(self) -> Optimizer:
        return sgd([p for p in self.parameters() if p.requires_grad])


class Unfreeze(BaseFinetuning):
    """Lightning's own way to do it."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[5])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[5], optimizer)


def test_a_layer_that_joins_the_optimizer_later_stays_on_its_mask() -> None:
    method = RigL(0.3, include=["net.5", "net.7"], update_interval=4)
    result = fit([method, Unfreeze(), DensityMonitor()], Unfrozen)
    assert {sum(live.values()) for _, live in result.history} == {round(0.3 * 2112)}
    assert result.weights["net.5.weight"].count_nonzero() > 0


def test_optimizers_made_anew_in_training() -> None:
    class Renewed(TinyModel):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    result = fit([RigL(0.3, update_interval=4)], Renewed)
    assert set(totals(result)) == {round(0.3 * NUMEL)}
    assert moves(result) == [4, 8, 12, 16]


class Turns(ManualModel):
    """Two optimizers in turns, each with a backward pass of its own; they share a layer."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = [list(self.net[i].parameters()) for i in (0, 5, 7)]  # type: ignore[index, arg-type]
        return [sgd(layers[0] + layers[1]), sgd(layers[1] + layers[2])]


def test_a_weight_that_two_optimizers_step_stays_on_its_mask() -> None:
    result = fit([RigL(0.3, update_interval=4, update_end=18)], Turns)
    assert set(totals(result)) == {round(0.3 * NUMEL)}
    assert result.changes > 0


def test_a_model_without_an_optimizer_has_masks_all_the_same() -> None:
    class Idle(TinyModel):
        def configure_optimizers(self) -> None:
            return None

    with pytest.warns(UserWarning, match="no optimizer"):
        result = fit([StaticSparse(0.3)], Idle, max_epochs=1)
    assert result.live == round(0.3 * NUMEL)


# Steps that do not count ----------------------------------------------------------


class Sick(TinyModel):
    """NaN in the gradients off the masks, where clipping or hooks do not see it."""

    bad: tuple[int, ...] = (3,)

    def on_after_backward(self) -> None:
        keeper = MaskKeeper.of(self.trainer)
        assert keeper is not None
        assert keeper.masks is not None
        for kept in keeper.masks if self.global_step in self.bad else ():
            assert kept.parameter.grad is not None
            kept.parameter.grad[~kept.mask] = math.nan


class VerySick(Sick):
    bad = (3, 4, 5, 6)


class SickAtTheHandOver(Sick):
    bad = (7,)


def test_an_illness_of_several_steps_is_told_once() -> None:
    with pytest.warns(UserWarning, match="waits for the next step") as warned:
        result = fit([RigL(0.3, update_interval=4)], VerySick)
    assert moves(result) == [8, 12, 16]
    told = [str(w.message) for w in warned if "waits for" in str(w.message)]
    assert len(told) == 1
    assert "net.0.weight" in told[0], "the layer has a name"


def test_a_hand_over_that_is_put_off_is_not_lost() -> None:
    first = SET(0.5, update_interval=4, update_end=7)
    second = RigL(0.2, update_interval=4, update_start=8, update_end=20)
    with pytest.warns(UserWarning, match="waits for the next step"):
        result = fit([first, second], SickAtTheHandOver)
    assert totals(result)[:8] == [round(0.5 * NUMEL)] * 8
    assert totals(result)[8:] == [round(0.2 * NUMEL)] * 16


class Silent(TinyModel):
    """Every fourth batch has no loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 4 == 3 else self.loss(batch)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_batches_without_a_loss() -> None:
    result = fit([RigL(0.3, update_interval=4)], Silent)
    assert moves(result) == [5, 9, 13, 17]
    # With accumulation the other batch of the pair has a gradient: the step is real.
    result = fit([RigL(0.3, update_interval=2)], Silent, accumulate_grad_batches=2)
    assert moves(result) == [4, 8, 12, 16]


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.", "ignore:Checkpoint directory")
def test_an_update_that_waits_is_saved_with_the_rest(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [RigL(0.3, update_interval=4), saver]
        return fit(callbacks, Silent, enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / "step=12.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[12:]


def test_a_user_who_steps_every_second_batch() -> None:
    class Slow(TinyModel):
        def optimizer_step(  # type: ignore[override]
            self, epoch: int, batch_idx: int, optimizer: Any, closure: Any
        ) -> None:
            if batch_idx % 2:
                optimizer.step(closure=closure)
            else:
                closure()

    result = fit([RigL(0.3, update_interval=3, update_end=10)], Slow)
    assert moves(result) == [6, 12, 18]


# Checkpoints ----------------------------------------------------------------------


def test_a_file_saved_after_fit_resumes_like_one_saved_in_training(tmp_path: Path) -> None:
    def rigl() -> RigL:
        return RigL(0.3, update_interval=3, update_end=18)

    whole = fit([rigl()])
    part = fit([rigl()], max_epochs=2)
    part.trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest = fit([rigl()], ckpt_path=str(tmp_path / "part.ckpt"), seed=77)
    rest.assert_equal(whole)


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_manual_optimization_resumes(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Result:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        callbacks = [RigL(0.3, update_interval=3, update_end=18), saver]
        return fit(callbacks, ManualModel, enable_checkpointing=True, **kwargs)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / "step=24.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[12:]


def test_a_ramp_that_joins_a_dense_training_arrives(tmp_path: Path) -> None:
    dense = fit([], max_epochs=1)
    dense.trainer.save_checkpoint(tmp_path / "dense.ckpt")
    result = fit([GMP(0.3, update_interval=4)], ckpt_path=str(tmp_path / "dense.ckpt"))
    assert len(result.history) == 16
    assert result.live == round(0.3 * NUMEL)


@pytest.mark.parametrize(
    ("then", "now", "said", "unsaid"),
    [
        (
            lambda: [RigL(0.3)],
            lambda: [StaticSparse(0.3), RigL(0.3)],
            r"callbacks: \['RigL\(density=0\.3\)'\].*StaticSparse",
            "optimizers",
        ),
        (
            lambda: [
                RigL(0.3, update_end=4),
                GMP(0.1, update_start=4, update_end=8, update_interval=2),
            ],
            lambda: [RigL(0.3)],
            r"callbacks: .*GMP",
            "optimizers",
        ),
        (
            lambda: [RigL(0.3)],
            lambda: [RigL(0.3, exclude="net.0")],
            r"net\.0\.weight: \(8, 1, 3, 3\) Unstructured\(\) in the checkpoint, absent now",
            "net.5.weight",
        ),
        (
            lambda: [RigL(0.3, exclude="net.0")],
            lambda: [RigL(0.3)],
            r"net\.0\.weight: absent in the checkpoint, \(8, 1, 3, 3\)",
            "callbacks",
        ),
    ],
    ids=["one more", "one less", "fewer layers", "more layers"],
)
@pytest.mark.filterwarnings("ignore:.* makes no update", "ignore:GMP. training ended")
def test_a_refused_checkpoint_says_what_differs_and_no_more(
    then: Any, now: Any, said: str, unsaid: str, tmp_path: Path
) -> None:
    fit(then(), max_epochs=1).trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer = quiet_trainer(now(), max_epochs=2)
    with pytest.raises(MisconfigurationException, match=said) as caught:
        trainer.fit(TinyModel(), Batches(), ckpt_path=tmp_path / "end.ckpt")
    assert "nothing was restored" in str(caught.value)
    differences = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert not any(unsaid in line for line in differences)
    keeper = MaskKeeper.of(trainer)
    assert keeper is not None
    assert keeper.masks is None
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:RigL makes no update")
def test_a_refused_checkpoint_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    fit([RigL(0.3)], max_epochs=1).trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer = quiet_trainer([SET(0.3)], max_epochs=2)
    torch.manual_seed(11)
    model, before = TinyModel(), torch.get_rng_state()
    with pytest.raises(MisconfigurationException, match="nothing was restored"):
        trainer.fit(model, Batches(), ckpt_path=tmp_path / "end.ckpt")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_may_change_between_then_and_now(tmp_path: Path) -> None:
    first = fit([RigL(0.3, update_interval=4)], max_epochs=1)
    first.trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = RigL(0.3, update_interval=3, drop_fraction=0.1, distribution=uniform, update_end=1.0)
    result = fit([other], ckpt_path=str(tmp_path / "end.ckpt"))
    assert result.history[0][0] != first.history[-1][0], "step 9 is due"
    assert moves(result) == [4, 7, 10, 13], "and 12, 15, 18 and 21"
    assert {sum(live.values()) for _, live in result.history} == {first.live}


# Statistics -----------------------------------------------------------------------


class Looking(MaskCallback):
    """Counts the micro-batches that an update sees, and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[dict[str, tuple[int, int]]] = []
        super().__init__(
            density=0.3,
            default_distribution=uniform,
            initial=drop(random),
            update=self._look,
            update_interval=4,
            statistics={"inputs", "output_grads"},
        )

    def _look(self, layers: Layers, budget: Budget, progress: float) -> Layers:
        found = {layer.name: layer.statistics for layer in layers}
        self.seen.append({k: (len(s["inputs"]), len(s["output_grads"])) for k, s in found.items()})
        return layers


def by_keyword(net: Any, x: Tensor) -> Tensor:
    for module in net:
        x = module(input=x)
    return x


def recomputed(net: Any, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(net, x.requires_grad_(), use_reentrant=False)
    return out


@pytest.mark.parametrize("forward", [by_keyword, recomputed])
def test_layers_are_recorded_once_however_they_are_called(forward: Any) -> None:
    class Called(TinyModel):
        def loss(self, batch: Batch) -> Tensor:
            return nn.functional.cross_entropy(forward(self.net, batch[0]), batch[1])

    method = Looking()
    fit([method], Called, max_epochs=1)
    assert method.seen == [dict.fromkeys(SIZES, (1, 1))]


# Trainers -------------------------------------------------------------------------


def test_a_start_that_failed_is_forgotten() -> None:
    second = RigL(None, include="net.5", update_interval=2)
    probe = Probe()
    trainer = quiet_trainer([StaticSparse(0.3, include="net.7"), second, probe], max_epochs=1)
    module = TinyModel()
    with pytest.raises(ValueError, match="a density is needed"):
        trainer.fit(module, Batches())
    assert all(module.net[i].weight.all() for i in (0, 5, 7))  # type: ignore[index, union-attr]
    second.density = 0.5
    trainer.fit(module, Batches())
    assert {name: int(mask.sum()) for name, mask in probe.masks.items()} == {
        "net.5.weight": 1024,
        "net.7.weight": 19,
    }


def test_another_model_in_the_same_trainer_begins_anew() -> None:
    probe = Probe()
    trainer = quiet_trainer([RigL(0.3, update_interval=2), probe], max_epochs=1)
    trainer.fit(TinyModel(), Batches())
    assert len(probe.masks) == 3
    trainer.fit_loop.max_epochs = 2
    trainer.fit(TinyModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4))), Batches())
    assert {name: int(mask.sum()) for name, mask in probe.masks.items()} == {"net.1.weight": 43}


def test_a_module_that_brings_its_callbacks() -> None:
    class Own(TinyModel):
        def configure_callbacks(self) -> Any:
            return [RigL(0.3, update_interval=4)]

    own, given = fit([], Own), fit([RigL(0.3, update_interval=4)])
    own.assert_equal(given)
    assert own.history == given.history


def test_an_older_optimizer_state_comes_back_with_zeros_off_the_mask() -> None:
    class Reload(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            optimizer = trainer.optimizers[0]
            if trainer.global_step == 3:
                self.state = copy.deepcopy(optimizer.state_dict())
            elif trainer.global_step == 7:
                optimizer.load_state_dict(self.state)

    fit([Reload(), RigL(0.3, update_interval=2)])  # looks at weights and state after every batch
