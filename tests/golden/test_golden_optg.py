"""OptG against the numbers of its authors' program.

The program counts ``int(N * (1 - P))`` weights, finds the score of the last of them, and keeps
all that are not below it: ties live on, and where all scores are equal nothing is pruned. Here
the count is exact; the first epoch is dense, as it comes out there too.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_sparsity import OptG
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.method import Share
from lightning_sparsity.testing import TinyModel, fit, quiet_trainer

HERE = Path(__file__).parent
CASES = {
    case["name"]: case
    for case in json.loads((HERE / "learned.json").read_text())["cases"]
    if case["name"].startswith("optg_")
}
SCHEDULES = [case for name, case in CASES.items() if name.startswith("optg_schedule_")]
STEPS = 7  # of an epoch; any number will do


def in_training(given):
    """The callback and its window in a training of ``tau`` epochs, as the engine asks them."""
    method = OptG(1 - given["P"], alpha=given["alpha"])
    trainer = quiet_trainer([method], max_epochs=given["tau"])
    method.setup(trainer, TinyModel(), "fit")
    return method, method.window.resolve(STEPS * given["tau"], arrives=True)


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["name"])
def test_sparsity_of_an_epoch(case):
    method, window = in_training(case["inputs"])
    density = method.ramp(1.0, method.density)
    for expected in case["expected"]:
        before_epoch = window.progress(STEPS * expected["epoch"])
        sparsity = 1 - density(before_epoch)
        assert sparsity == pytest.approx(expected["sparsity"], abs=case["tol"]), expected


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["name"])
def test_learning_rate_of_the_scores(case):
    method, window = in_training(case["inputs"])
    last = case["inputs"]["tau"] - 1  # the mask is final then, and scores are not trained
    for expected in case["expected"]:
        epoch = expected["epoch"]
        for step in range(STEPS * epoch + 1, STEPS * (epoch + 1) + 1) if epoch < last else ():
            found = method.learning_rate(expected["weight_lr"], window.progress(step))
            assert found == pytest.approx(expected["mask_lr"], rel=case["tol"], abs=0), expected


def chosen(given, density):
    layers = []
    for place, scores in enumerate(given["scores"]):
        shape = given["layer_shapes_out_in_k"][place]
        score = torch.tensor(scores).view(shape)
        mask = torch.ones(shape, dtype=torch.bool)
        layers.append(Layer(f"{place}", torch.ones(shape), mask, slots={"score": score}))
    sizes = {layer.name: layer.size for layer in layers}
    share = Share(tuple(sizes), (sum(sizes.values()),), 0, found=False, start=sizes)
    masks = [layer.mask for layer in OptG(density).update(layers, share, 1.0)]
    return [mask.flatten().tolist() for mask in masks]


@pytest.mark.parametrize("name", ["optg_mask_global", "optg_mask_negative"])
def test_mask(name):
    given, expected = CASES[name]["inputs"], CASES[name]["expected"]
    assert chosen(given, 1 - given["P"]) == expected["masks"]


@pytest.mark.parametrize("name", ["optg_mask_all_zero_scores", "optg_mask_ties_at_threshold"])
def test_ties_do_not_add_to_the_count(name):
    given, expected = CASES[name]["inputs"], CASES[name]["expected"]
    keep = round(10 * (1 - given["P"]))
    assert sum(expected["kept"]) > keep
    ours = [live for mask in chosen(given, 1 - given["P"]) for live in mask]
    theirs = [live for mask in expected["masks"] for live in mask]
    scores = [score for layer in given["scores"] for score in layer]
    threshold = sorted(scores, reverse=True)[keep - 1]
    assert sum(ours) == keep
    for score, mine, other in zip(scores, ours, theirs, strict=True):
        assert mine == other or (score == threshold and other)


def test_two_epochs():
    case = CASES["optg_two_epochs"]
    given, seen = case["inputs"], []

    class Given(OptG):
        """Starts from the scores of the file, which are not 0, and so from a mask."""

        def extras(self, layer):
            place = int(layer.name.split(".")[1])
            return {"score": torch.tensor(given["scores"][place]).view_as(layer.weight)}

        def learning_rate(self, lr, progress):
            return given["score_lr"]

        def gradients(self, layer):
            found = super().gradients(layer)
            gradients.append(found["score"].flatten())
            return found

    gradients = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            self.masks = [kept.mask.clone() for kept in MaskKeeper.of(trainer).masks]

        def on_train_batch_end(self, trainer, module, outputs, *args):
            kept = list(MaskKeeper.of(trainer).masks)
            step = {
                "mask": [mask.flatten().float() for mask in self.masks],
                "loss": outputs["loss"],
                "grad_weight": [p.parameter.grad.flatten() for p in kept],
                "grad_score": gradients[-2:],
                "weight": [p.parameter.detach().flatten().clone() for p in kept],
                "score": [p.slots["score"].flatten().clone() for p in kept],
            }
            seen.append(step)

    def layers():
        made = []
        for weight, (out, into, _) in zip(
            given["weights"], given["layer_shapes_out_in_k"], strict=True
        ):
            made.append(nn.Conv2d(into, out, 1, bias=False))
            made[-1].weight.data.copy_(torch.tensor(weight).view(out, into, 1, 1))
        return nn.Sequential(*made)

    class Summed(TinyModel):
        def training_step(self, batch, batch_idx):
            return (torch.tensor(given["coef"]) * self.net(batch)).sum()

    def sgd(parameters):
        return torch.optim.SGD(
            parameters,
            lr=given["weight_lr"],
            momentum=given["momentum"],
            weight_decay=given["weight_decay_on_weights"],
        )

    # int(6 * 0.66) and int(6 * 0.5) are both 3 of 6
    method = Given(0.5, momentum=given["momentum"], update_end=1.0)
    method.initial_density = 0.5
    data = DataLoader([torch.tensor(given["x_NCHW"])] * given["steps_per_epoch"], batch_size=None)
    fit([method, Watch()], lambda: Summed(layers(), sgd), data=data, max_epochs=2)
    expected = [
        {"mask": epoch["mask"], **step} for epoch in case["expected"] for step in epoch["steps"]
    ]
    assert len(seen) == len(expected) == 4
    for mine, theirs in zip(seen, expected, strict=True):
        for key in mine:
            pairs = [(mine[key], theirs[key])]
            pairs = pairs if key == "loss" else zip(mine[key], theirs[key], strict=True)
            for ours, numbers in pairs:
                wanted = torch.tensor(numbers, dtype=torch.float32)
                torch.testing.assert_close(
                    ours, wanted, rtol=case["tol"], atol=case["tol"], msg=lambda m, k=key: k + m
                )
