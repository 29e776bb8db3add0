"""Layer collapse in training: who says what, and when training stops."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_sparsity import (
    DensityMonitor,
    MaskCallback,
    Rows,
    SparseCompute,
    StaticSparse,
    uniform,
)
from lightning_sparsity.connectivity import CollapseError, effective_density, layers_of, wiring
from lightning_sparsity.core.layer import Budget, Layer, Layers
from lightning_sparsity.rules import chain, drop
from lightning_sparsity.scores import random
from lightning_sparsity.testing import fit

DEAD = r": net\.5\.weight has no live weight left"
LAYERS = ["net.0.weight", "net.5.weight", "net.7.weight"]


def starve(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Take every weight from the layer in the middle, in the second half of the window."""
    return [_emptied(one) if one.name == LAYERS[1] and progress >= 0.5 else one for one in layers]


def cut(layers: Layers, budget: Budget, progress: float) -> Layers:
    """Have the middle layer write to its first unit, and the last one read its second."""
    made = []
    for layer in layers:
        mask = torch.zeros_like(layer.mask)
        if layer.name == LAYERS[1]:
            mask[0] = True
        elif layer.name == LAYERS[2]:
            mask[:, 1] = True
        units = layer.units if layer.name == LAYERS[0] else mask.flatten()
        made.append(layer.with_units(units))
    return made


def _emptied(layer: Layer) -> Layer:
    return layer.with_units(torch.zeros_like(layer.units))


class Changing(MaskCallback):
    """Half of the weights, drawn; then a rule at steps 4, 8 and 12."""

    def __init__(self, update: Any) -> None:
        super().__init__(
            density=0.5,
            default_distribution=uniform,
            initial=drop(random),
            update=update,
            update_interval=4,
            update_end=12,
        )


class EmptyStart(MaskCallback):
    """Starts with nothing in the middle."""

    def __init__(self) -> None:
        super().__init__(
            density=0.5,
            default_distribution=uniform,
            initial=chain(drop(random), lambda layers, budget, _: starve(layers, budget, 1.0)),
            role="initial",
        )


def told(found: pytest.WarningsRecorder) -> int:
    """How many warnings are ours."""
    texts = [str(warning.message) for warning in found]
    return sum("no live weight" in text or "on a path" in text for text in texts)


class Recorder(DensityMonitor):
    """A monitor that keeps what it would log after every batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows: list[dict[str, float]] = []
        self.told: list[str] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        assert self._watch is not None
        self.rows.append(self._watch.metrics())

    def _print(self, text: str) -> None:
        self.told.append(text)


# ------------------------------------------------------------------------------ warning


def test_an_update_that_leaves_nothing_is_told_once() -> None:
    with pytest.warns(UserWarning, match="Changing" + DEAD) as found:
        result = fit([Changing(starve)])
    assert told(found) == 1
    assert result.history[-1][1]["net.5.weight"] == 0


def test_a_start_that_leaves_nothing_is_told_once() -> None:
    with pytest.warns(UserWarning, match="EmptyStart" + DEAD) as found:
        fit([EmptyStart(), DensityMonitor(on_collapse="warn", print_tables=False)])
    assert told(found) == 1


def test_every_fit_tells_it() -> None:
    method = EmptyStart()
    for _ in range(2):
        with pytest.warns(UserWarning, match=DEAD):
            fit([method])


def test_dead_neurons_are_told_once_per_layer() -> None:
    def dying(layers: Layers, budget: Budget, progress: float) -> Layers:
        """A neuron of the middle layer at step 4, one of the first at steps 8 and 12."""
        place = 1 if progress < 0.5 else 0
        made = list(layers)
        mask = made[place].mask.clone()
        mask[0] = False
        made[place] = made[place].with_units(mask.flatten())
        return made

    with pytest.warns(UserWarning, match="Dead neurons") as found:
        fit([Changing(dying), DensityMonitor(connectivity=True, print_tables=False)])
    ours = [str(w.message) for w in found if "Dead neurons" in str(w.message)]
    says = "Dead neurons, which nothing enters or nothing reads: "
    assert ours == [f"{says}1 of 16 in net.5.weight.", f"{says}1 of 8 in net.0.weight."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        fit([Changing(dying), DensityMonitor(print_tables=False)])


def test_dead_neurons_do_not_hide_a_collapse() -> None:
    def dying(layers: Layers, budget: Budget, progress: float) -> Layers:
        """A neuron of each layer, then all but one channel, which nobody reads."""
        masks = [layer.mask.clone() for layer in layers]
        for mask in masks:
            mask[0] = False
        if progress >= 0.5:
            masks[0][2:] = False
            masks[1][:, 16:32] = False
        return [layer.with_units(mask.flatten()) for layer, mask in zip(layers, masks, strict=True)]

    with pytest.warns(UserWarning, match="Dead neurons|Layer collapse") as found:
        fit([Changing(dying), DensityMonitor(connectivity=True, print_tables=False)])
    said = [str(w.message) for w in found]
    assert any("Dead neurons" in text and "net.5.weight" in text for text in said)
    assert any(
        "Layer collapse" in text and "on a path" in text and "net.5.weight" in text for text in said
    )


# -------------------------------------------------------------------------------- error


@pytest.mark.filterwarnings("ignore:.*has no live weight left")
def test_error_at_the_start() -> None:
    seen = Batches()
    with pytest.raises(CollapseError, match=r"no live weight is left in net\.5\.weight"):
        fit([EmptyStart(), DensityMonitor(on_collapse="error"), seen])
    assert seen.count == 0


@pytest.mark.filterwarnings("ignore:.*has no live weight left")
def test_error_at_the_update() -> None:
    seen = Batches()
    with pytest.raises(CollapseError, match=r"no live weight is left in net\.5\.weight"):
        fit([Changing(starve), DensityMonitor(on_collapse="error"), seen])
    assert seen.count == 8 - 1  # the batch of step 8 does not end


@pytest.mark.filterwarnings("ignore:.*has no live weight left")
def test_error_on_resuming(tmp_path: Any) -> None:
    path = str(tmp_path / "last.ckpt")
    fit([EmptyStart()], max_epochs=1).trainer.save_checkpoint(path)
    with pytest.raises(CollapseError):
        fit([EmptyStart(), DensityMonitor(on_collapse="error")], ckpt_path=path)


class Batches(pl.Callback):
    """Counts the batches that ended."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


@pytest.mark.filterwarnings("ignore:Dead neurons")
def test_a_cut_is_seen_with_connectivity_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        fit([Changing(cut), DensityMonitor(on_collapse="error", print_tables=False)])
    message = "none is on a path from input to output in " + ", ".join(LAYERS)
    with pytest.raises(CollapseError, match=message):
        fit([Changing(cut), DensityMonitor(connectivity=True, on_collapse="error")])
    with pytest.warns(UserWarning, match=message) as found:
        fit([Changing(cut), DensityMonitor(connectivity=True)])
    assert told(found) == 1


# ------------------------------------------------------------------------------- scalars


@pytest.mark.filterwarnings("ignore:Dead neurons")
def test_scalars_by_hand() -> None:
    monitor = Recorder(connectivity=True)
    with pytest.warns(UserWarning, match="Layer collapse"):
        fit([Changing(cut), monitor])
    before, after = monitor.rows[2], monitor.rows[3]
    assert 0 < before["effective_density/total"] <= before["density/total"] == 0.5
    assert after["effective_density/total"] == 0
    assert [before[f"collapse/{name}"] for name in ("total", *LAYERS)] == [0, 0, 0, 0]
    assert [after[f"collapse/{name}"] for name in ("total", *LAYERS)] == [3, 1, 1, 1]
    assert after["dead_neurons/net.5.weight"] == 16
    assert after["dead_neurons/net.7.weight"] == 0


@pytest.mark.filterwarnings("ignore:.*no live weight left")
@pytest.mark.parametrize("storage", [[], [SparseCompute("csr")]])
def test_collapse_is_logged_by_layer(storage: list[Any]) -> None:
    for connectivity, gone in ((False, [1, 0, 1, 0]), (True, [3, 1, 1, 1])):
        monitor = Recorder(connectivity=connectivity)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Layer collapse|Dead neurons", UserWarning)
            fit([Changing(starve), monitor, *storage])
        row = monitor.rows[-1]
        assert [row[f"collapse/{name}"] for name in ("total", *LAYERS)] == gone


@pytest.mark.filterwarnings("ignore:Dead neurons")
def test_scalars_are_those_of_the_masks() -> None:
    monitor = Recorder(connectivity=True)
    result = fit([StaticSparse(0.02), monitor])
    found = wiring(layers_of(result.model, result.masks))
    assert monitor.rows[-1]["effective_density/total"] == effective_density(found)
    for name in LAYERS:
        assert monitor.rows[-1][f"dead_neurons/{name}"] == found[name].dead_neurons
    assert monitor.rows[-1]["effective_density/total"] < monitor.rows[-1]["density/total"]


def test_paths_pass_through_dense_layers() -> None:
    monitor = Recorder(connectivity=True)
    fit([StaticSparse(0.5, structure=Rows(), exclude=["net.5", "net.7"]), monitor])
    row = monitor.rows[-1]
    assert row["effective_density/total"] == row["density/total"] == 0.5
    assert row["dead_neurons/net.0.weight"] == 4
    assert not any(name in key for key in row for name in LAYERS[1:])


def test_weights_that_are_in_no_chain_count_as_they_are() -> None:
    monitor = Recorder(connectivity=True)
    halves = StaticSparse(0.5, distribution=uniform, include=["net.1.weight", "net.7"])
    fit([halves, monitor])
    row = monitor.rows[-1]  # 8 weights of the normalisation, 64 of the last layer
    assert row["density/net.1.weight"] == 0.5
    assert "dead_neurons/net.1.weight" not in row
    assert row["effective_density/total"] == row["density/total"] == 0.5


def test_nothing_is_measured_unless_asked() -> None:
    monitor = Recorder()
    fit([StaticSparse(0.02), monitor])
    assert not any("effective" in key or "dead" in key for key in monitor.rows[-1])
    assert not any("Effective" in text for text in monitor.told)


@pytest.mark.filterwarnings("ignore:Dead neurons")
def test_reports() -> None:
    monitor = Recorder(connectivity=True)
    fit([StaticSparse(0.02), monitor])
    start, end = monitor.told[0], monitor.told[-1]
    for text in (start, end):
        assert "dead rows" in text
        assert "Effective density: 0.0" in text
    assert "Effective density" not in "".join(monitor.told[1:-1])


def test_a_dense_model() -> None:
    monitor = Recorder(connectivity=True)
    fit([monitor])
    assert monitor.rows[-1]["effective_density/total"] == 1


@pytest.mark.filterwarnings("ignore:Dead neurons")
def test_watching_changes_nothing() -> None:
    watched = fit([StaticSparse(0.1), Recorder(connectivity=True)])
    watched.assert_equal(fit([StaticSparse(0.1)]))


# ----------------------------------------------------------------------------- arguments


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r'on_collapse=\'stop\'\): must be "warn" or "error"'):
        DensityMonitor(on_collapse="stop")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"connectivity=1\): must be True or False"):
        DensityMonitor(connectivity=1)  # type: ignore[arg-type]
    copied = pickle.loads(pickle.dumps(DensityMonitor(connectivity=True, on_collapse="error")))
    assert copied.connectivity
    assert copied.on_collapse == "error"
