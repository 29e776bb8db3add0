"""Top-KAST: three sets of weights, that compute, that only train, and that stand still.

What it has in common with others, and a plain loop of it, are in test_straight_through.py.
"""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparsity import NM, Rows, StaticSparse
from lightning_sparsity.callbacks.learned.top_kast import TopKAST
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.masks import optimizer_state
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import TinyModel, fit

NUMEL = 8 * 9 + 128 * 16 + 16 * 4


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


class Watch(Callback):
    """Counts what moves in every step, of each of the three sets."""

    def __init__(self):
        self.moved = {"live": 0, "explored": 0, "rest": 0}
        self.states, self.sets = [], []

    def on_train_batch_start(self, trainer, *args):
        self.before = {
            k.name: (k.parameter.detach().clone(), k.mask.clone(), k.slots["trained"].clone())
            for k in MaskKeeper.of(trainer).masks
        }
        self.sets.append({name: sets[1:] for name, sets in self.before.items()})

    def on_train_batch_end(self, trainer, *args):
        for kept in MaskKeeper.of(trainer).masks:
            old, mask, trained = self.before[kept.name]
            moved = kept.parameter.detach() != old
            self.moved["live"] += int(moved[mask].sum())
            self.moved["explored"] += int(moved[trained & ~mask].sum())
            self.moved["rest"] += int(moved[~trained].sum())
            for state in optimizer_state(kept, trainer.optimizers[0]):
                self.states.append(bool(state[~trained].any()))


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("every", [1, 5])
def test_outside_the_larger_set_nothing_moves(optimizer, every):
    watch = Watch()
    fit([TopKAST(0.3, update_interval=every), watch], lambda: TinyModel(optimizer=optimizer))
    assert watch.moved["live"] > 0.9 * 24 * 0.3 * NUMEL
    assert watch.moved["explored"] > 0.9 * 24 * 0.1 * NUMEL
    assert watch.moved["rest"] == 0
    assert watch.states
    assert not any(watch.states)


def test_the_larger_set_has_the_largest_weights_too():
    watch = Watch()
    fit([TopKAST(0.3, exploration=0.2), watch])
    for name, (mask, trained) in watch.sets[-1].items():
        weight = watch.before[name][0].abs()
        assert int(trained.sum()) == int(mask.sum()) + -(-mask.numel() // 5)  # rounded up
        assert weight[mask].min() >= weight[trained & ~mask].max()
        assert weight[trained].min() >= weight[~trained].max()


def test_without_exploration_only_live_weights_learn():
    watch = Watch()
    result = fit([TopKAST(0.3, exploration=0), watch])
    assert watch.moved["explored"] == watch.moved["rest"] == 0
    assert watch.moved["live"] > 0
    assert result.changes > 0  # live weights shrink below others, which enter as they were left


def test_all_weights_may_explore():
    watch = Watch()
    result = fit([TopKAST(0.3, exploration=1), watch])
    assert all(trained.all() for _, trained in watch.sets[-1].values())
    assert result.live == round(0.3 * NUMEL)


def test_units_and_patterns_explore_whole():
    watch = Watch()
    fit([TopKAST(structure=NM(1, 4), exclude="net.0"), watch])
    for mask, trained in watch.sets[-1].values():
        assert (NM(1, 4).group(mask, Layout()).sum(1) == 1).all()
        assert (NM(1, 4).group(trained, Layout()).sum(1) == 2).all()  # 0.1 of 4, rounded up
    watch = Watch()
    fit([TopKAST(0.5, structure=Rows()), watch])
    mask, trained = watch.sets[-1]["net.5.weight"]
    assert trained.any(1).sum() == trained.all(1).sum() == mask.any(1).sum() + 2  # 0.1 of 16


def test_explores_within_found_masks_only():
    watch = Watch()
    found = fit([StaticSparse(0.5)], max_epochs=1).masks
    result = fit([StaticSparse(0.5), TopKAST(0.2), watch])
    assert result.live == round(0.2 * NUMEL)
    assert result.changes > 10
    for name, (mask, trained) in watch.sets[-1].items():
        assert not (trained & ~found[name]).any()
        assert int(trained.sum()) > int(mask.sum())


# ---------------------------------------------------------------------------- penalty


def layer(mask, trained):
    return Layer(
        "layer",
        weight=torch.tensor([[4.0, -2.0, 1.0, -1.0]]),
        mask=torch.tensor([mask]).bool(),
        grad=torch.tensor([[1.0, 1.0, 1.0, 1.0]]),
        slots={"trained": torch.tensor([trained]).bool()},
    )


@pytest.mark.parametrize(
    ("kind", "expected"), [("l2", [1.4, 0.2, 1.4, 0.0]), ("l1", [1.1, 0.6, 1.4, 0.0])]
)
def test_the_penalty_is_stronger_where_it_explores(kind, expected):
    # D is 1/4: 0.1 times the slope where the weight lives, 0.4 times where it explores
    method = TopKAST(0.25, decay=0.1, penalty=kind)
    found = method.gradients(layer([1, 0, 0, 0], [1, 1, 1, 0]))["weight"]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_dense_and_empty_layers():
    method = TopKAST(0.25, decay=0.1)
    dense = method.gradients(layer([1, 1, 1, 1], [1, 1, 1, 1]))["weight"]
    assert torch.equal(dense, torch.ones(1, 4))
    empty = method.gradients(layer([0, 0, 0, 0], [1, 0, 0, 0]))["weight"]
    torch.testing.assert_close(empty, torch.tensor([[1 + 4 * 0.1 * 4, 0, 0, 0]]))


def test_a_strong_penalty_keeps_the_mask_steadier():
    watches = {decay: Watch() for decay in (0.0, 0.1)}
    entered = {}
    for decay, watch in watches.items():
        fit([TopKAST(0.1, exploration=0.2, decay=decay), watch])
        pairs = zip(watch.sets, watch.sets[1:], strict=False)
        entered[decay] = sum(int((b[name][0] & ~a[name][0]).sum()) for a, b in pairs for name in a)
    assert entered[0.0] > 1.3 * entered[0.1] > 0


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            {"exploration": 1.5},
            ValueError,
            r"\(exploration=1.5\): exploration must lie in \[0, 1\]",
        ),
        ({"exploration": "0.1"}, TypeError, r"\(exploration='0.1'\): exploration must be a number"),
        ({"decay": -1}, ValueError, r"\(decay=-1\): decay must be at least 0"),
        ({"decay": None}, TypeError, r"\(decay=None\): decay must be a number"),
        ({"penalty": "L2"}, ValueError, r"""\(penalty='L2'\): must be "l2" or "l1"\."""),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=rf"^TopKAST{message}"):
        TopKAST(0.3, **bad)
