"""SR-STE: the decay of the weights left out keeps the pattern steadier.

What it has in common with others, and a plain loop of it, are in test_straight_through.py.
"""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sparsity import NM, Unstructured
from lightning_sparsity.callbacks.learned.sr_ste import SRSTE
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import fit


class Watch(Callback):
    def __init__(self):
        self.masks = []

    def on_train_batch_end(self, trainer, *args):
        kept = list(MaskKeeper.of(trainer).masks)
        self.masks.append(torch.cat([k.mask.flatten() for k in kept]))
        latent = torch.cat([k.parameter.detach().flatten() for k in kept])
        self.off = float(latent[~self.masks[-1]].abs().mean())

    @property
    def flips(self):
        pairs = zip(self.masks, self.masks[1:], strict=False)
        return sum(int((a != b).sum()) for a, b in pairs)


def test_two_of_four_by_default_and_the_first_layer_dense():
    result = fit([SRSTE()])
    assert list(result.masks) == ["net.5.weight", "net.7.weight"]
    for mask in result.masks.values():
        assert (NM(2, 4).group(mask, Layout()).sum(1) == 2).all()
    assert result.changes == 22


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [8, 12])
def test_a_pattern_resumes_to_the_bit(step, tmp_path):
    def run(**options):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([SRSTE(), saver], enable_checkpointing=True, **options)

    whole = run()
    rest = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), seed=77)
    rest.assert_equal(whole)
    assert rest.history == whole.history[step:]


def test_the_decay_makes_fewer_weights_change_places():
    watches = {decay: Watch() for decay in (0, 0.02, 1.0)}
    for decay, watch in watches.items():
        fit([SRSTE(decay=decay), watch])
    plain, some, strong = watches.values()
    assert plain.flips > some.flips > 2 * strong.flips > 0
    assert plain.off > some.off > 2 * strong.off > 0


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"decay": -1}, ValueError, r"^SRSTE\(decay=-1\): decay must be at least 0"),
        ({"decay": float("nan")}, ValueError, r"^SRSTE\(decay=nan\): decay must be at least 0"),
        ({"decay": "small"}, TypeError, r"^SRSTE\(decay='small'\): decay must be a number"),
        (
            {"density": 0.3},
            ValueError,
            r"^SRSTE\(density=0.3, structure=NM\(n=2, m=4\)\): the pattern fixes .* leave density",
        ),
        ({"structure": (2, 4)}, TypeError, r"^SRSTE\(structure=\(2, 4\)\): must be a structure"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=message):
        SRSTE(**bad)


def test_inputs_that_do_not_divide():
    message = r"net.0.weight: NM\(n=2, m=4\): m does not divide 1 inputs; leave .* with exclude="
    with pytest.raises(ValueError, match=message):
        fit([SRSTE(exclude=())])


def test_any_structure_with_a_density():
    result = fit([SRSTE(0.1, structure=Unstructured())])
    assert result.live == round(0.1 * (128 * 16 + 16 * 4))
