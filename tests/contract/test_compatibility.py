"""What users do with a Trainer, where the other contract tests leave a method out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from compatibility import INTRODUCTION, PAGE, PLACES, Claim, load, page, refuses, takes_structures
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import APART, END_DENSE, METHODS, stored
from test_core_contracts import STRUCTURES
from test_matrix import scaler
from torch import Tensor, nn

from lightning_sparsity import SparseCompute
from lightning_sparsity.core.filters import plain_name
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.storage import Storage
from lightning_sparsity.structures import Layout
from lightning_sparsity.testing import ManualModel, Result, TinyModel, fit

EVERY: dict[str, Callable[..., Any]] = {**METHODS, **APART}


class WithRate(TinyModel):
    """Has a learning rate to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Told(SparseCompute):
    """Keeps the reasons why weights stay dense."""

    def announce(self, masks: Masks, storage: Storage) -> None:
        self.reasons = dict(storage.reasons)


def sound(result: Result) -> None:
    """Raise unless all is finite and nothing lives off the masks."""
    assert all(value.isfinite().all() for value in result.weights.values())
    weights = {plain_name(key): value for key, value in result.weights.items()}
    assert all(not weights[key][~mask].any() for key, mask in result.masks.items())


@pytest.mark.parametrize(("name", "storage"), stored(EVERY, ["RigL"]))
def test_bf16_true(name: str, storage: str) -> None:
    told = Told("csr")
    compressed = [told] if storage == "csr" else []
    result = fit([EVERY[name](), *compressed], precision="bf16-true")
    sound(result)
    assert all(result.weights[key].dtype == torch.bfloat16 for key in result.masks)
    if storage == "csr":
        assert set(told.reasons) == set(result.masks)
        assert set(told.reasons.values()) == {
            "torch has no products of compressed bfloat16 weights"
        }
        result.assert_equal(fit([EVERY[name]()], precision="bf16-true"))


@pytest.mark.parametrize("name", APART)
def test_a_scaler(name: str) -> None:
    sound(fit([APART[name]()], plugins=[scaler()]))


@pytest.mark.parametrize("name", APART)
def test_manual_optimization_of_two_optimizers(name: str) -> None:
    if name.startswith("ESPN"):
        with pytest.raises(MisconfigurationException, match=f"^{name} gives its phases settings"):
            fit([APART[name]()], ManualModel)
        return
    sound(fit([APART[name]()], ManualModel))


@pytest.mark.parametrize("name", APART)
def test_averaged_weights(name: str) -> None:
    sound(fit([APART[name](), EMAWeightAveraging(decay=0.9)]))


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("name", APART)
def test_stochastic_weight_averaging(name: str) -> None:
    def net() -> TinyModel:
        layers = [nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4)]
        return TinyModel(nn.Sequential(*layers))

    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    if name == "ESPNFinetune":
        with pytest.raises(MisconfigurationException, match=f"^{name} and StochasticWeight"):
            fit([APART[name](), swa], net)
        return
    sound(fit([APART[name](), swa], net))


@pytest.mark.parametrize("name", APART)
def test_compiled(name: str) -> None:
    def compiled() -> TinyModel:
        model = TinyModel()
        model.net = torch.compile(model.net, backend="aot_eager")  # type: ignore[assignment]
        return model

    torch._dynamo.reset()
    result = fit([APART[name]()], compiled)
    assert list(result.masks) == ["net.0.weight", "net.5.weight", "net.7.weight"]
    sound(result)


@pytest.mark.parametrize("name", APART)
def test_learning_rate_finder(name: str, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=8, update_attr=False)
    finder._early_exit = False
    result = fit([APART[name](), finder], WithRate, default_root_dir=tmp_path)
    assert len(result.history) >= 24
    sound(result)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", [n for n in EVERY if takes_structures(n) and refuses(n, "nm")])
def test_structures_that_are_refused(name: str, structure: str) -> None:
    if refuses(name, structure):
        with pytest.raises(ValueError, match=rf"^{name}\(structure="):
            EVERY[name](structure=STRUCTURES[structure])
        return
    _in_units(name, structure)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", [n for n in APART if n.startswith("ESPN")])
def test_structures(name: str, structure: str) -> None:
    options: dict[str, Any] = {"density": None} if structure == "nm" else {}
    _in_units(name, structure, **options)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", END_DENSE)
def test_structures_before_the_dense_end(name: str, structure: str) -> None:
    options: dict[str, Any] = {"density": None} if structure == "nm" else {}
    result = _in_units(name, structure, while_sparse=True, **options)
    assert all(mask.all() for mask in result.masks.values())


class Sparsest(Callback):
    """The masks when the fewest weights lived."""

    masks: dict[str, Tensor]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        masks = {kept.name: kept.mask.clone() for kept in keeper.masks}
        live = sum(int(mask.sum()) for mask in masks.values())
        if live < getattr(self, "live", math.inf):
            self.live, self.masks = live, masks


def _in_units(name: str, structure: str, while_sparse: bool = False, **options: Any) -> Result:
    if structure in ("nm", "block"):  # which the first convolution's one channel does not fit
        options["exclude"] = "net.0"
    if name == "L0":  # of rows and columns there are few, and with those of the table none is left
        options |= {"droprate_init": 0.5}
    unit = STRUCTURES[structure]
    sparsest = Sparsest()
    result = fit([EVERY[name](structure=unit, **options), sparsest])
    sound(result)
    assert not while_sparse or not sparsest.masks["net.5.weight"].all()
    for mask in (sparsest if while_sparse else result).masks.values():
        whole = unit.live(mask, Layout())
        assert torch.equal(unit.expand(whole, tuple(mask.shape), Layout()), mask)
        if structure == "nm":
            assert (unit.group(mask, Layout()).sum(1) <= 1).all()  # type: ignore[attr-defined]
    return result


SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from methods import APART, METHODS
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import fit

torch.set_num_threads(1)
agree = {}


class Ranks(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        masks = MaskKeeper.of(trainer).masks
        mine = (masks.digest(), [p.detach().tolist() for p in module.parameters()])
        both = [None, None]
        torch.distributed.all_gather_object(both, mine)
        agree[name].append(both[0] == both[1])


generator = torch.Generator().manual_seed(0)
data = TensorDataset(
    torch.randn(128, 1, 6, 6, generator=generator), torch.randint(4, (128,), generator=generator)
)
for name, make in {**METHODS, **APART}.items():
    agree[name] = []
    try:
        fit([make(), Ranks()], data=DataLoader(data, batch_size=8), strategy="ddp", devices=2)
    except Exception as error:
        agree[name] = f"{type(error).__name__}: {error}"
if torch.distributed.get_rank() == 0:
    print("RESULT", json.dumps(agree), flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By method: whether masks and weights of two processes were equal, after every batch."""
    script = tmp_path_factory.mktemp("ddp") / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=script.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_two_processes_agree(name: str, ranks: Any) -> None:
    assert ranks[name] == [True] * 24


@pytest.mark.slow
def test_the_page_says_what_the_tests_show(tmp_path: Path) -> None:
    file = tmp_path / "shown.json"
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--compatibility", str(file)]
    with redirect_stdout(StringIO()):
        assert pytest.main([*options, *map(str, PLACES)]) == 0
    shown = load(file)
    assert {outcome for _, outcome in shown.values()} == {"not run"}
    assert page((many, True) for many, _ in shown.values()) == PAGE.read_text(), (
        f"make {PAGE.name} anew, as compatibility.py says"
    )


def test_the_page_claims_nothing_of_a_test_that_failed() -> None:
    one, both = [Claim("RigL", "swa")], [Claim("RigL", "swa"), Claim("RigL", "ema")]

    def ticks(*shown: tuple[list[Claim], bool]) -> int:
        return page(shown).removeprefix(INTRODUCTION).count("✓")

    assert ticks((one, True), (both, True)) == 2
    assert ticks((one, True)) == 1
    assert ticks((one, True), (both, False)) == 0
    with pytest.raises(ValueError, match="both of two things"):
        page([(one, True), ([Claim("RigL", "swa", "refused")], True)])
