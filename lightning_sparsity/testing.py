"""Tiny models, data and checks, to test mask methods: ours and your own.

Example::

    from lightning_sparsity.testing import fit

    result = fit([MyMethod(density=0.25)])
    assert result.live == 128
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.core.masks import Masks, optimizer_state
from lightning_sparsity.core.method import Method
from lightning_sparsity.core.shards import local, whole

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Any], Optimizer]


def sgd(parameters: Any) -> Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def tiny_net() -> nn.Module:
    """A convolution, normalisation, dropout and two linear layers for 6x6 pictures."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class TinyModel(pl.LightningModule):
    """A classifier trained by automatic optimization.

    Args:
        net: Maps ``(batch, 1, 6, 6)`` to ``(batch, 4)``.
        optimizer: Makes the optimizer from the parameters.
    """

    def __init__(self, net: nn.Module | None = None, optimizer: MakeOptimizer = sgd) -> None:
        super().__init__()
        self.net = net if net is not None else tiny_net()
        self._make = optimizer

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One forward pass."""
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        """One optimizer over all parameters."""
        return self._make(self.parameters())


class ManualModel(TinyModel):
    """The same under manual optimization, with one optimizer per half of the net.

    Args:
        raw: Step the bare torch optimizers, past Lightning's hooks.
        accumulate: Batches per step.
        kwargs: As for :class:`TinyModel`.
    """

    def __init__(self, *, raw: bool = False, accumulate: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self._raw = raw
        self._accumulate = accumulate

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Forward, backward and the steps of both optimizers."""
        optimizers = self.optimizers(use_pl_optimizer=not self._raw)
        assert isinstance(optimizers, list)
        self.manual_backward(self.loss(batch) / self._accumulate)
        if (batch_idx + 1) % self._accumulate == 0:
            for optimizer in optimizers:
                assert isinstance(optimizer, LightningOptimizer | Optimizer)
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        """Two optimizers."""
        parameters = list(self.parameters())
        half = len(parameters) // 2
        return [self._make(parameters[:half]), self._make(parameters[half:])]


class Batches:
    """Random pictures in a fixed order; a stateful loader, so that it resumes in mid-epoch.

    Args:
        count: Batches per epoch.
        size: Pictures per batch.
        shape: Of one picture.
    """

    def __init__(self, count: int = 8, size: int = 8, shape: Sequence[int] = (1, 6, 6)) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batches = [
            (
                torch.randn(size, *shape, generator=generator),
                torch.randint(4, (size,), generator=generator),
            )
            for _ in range(count)
        ]
        self._position = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        start, self._resume_at = self._resume_at, 0
        for place in range(start, len(self)):
            self._position = place + 1
            yield self._batches[place]

    def state_dict(self) -> dict[str, int]:
        """Where it stands in the epoch."""
        return {"position": self._position % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self._resume_at = state_dict["position"]


@dataclass
class Result:
    """What a training left behind.

    Args:
        model: The trained module.
        trainer: The Trainer.
        weights: Every parameter and buffer at the end.
        masks: Mask by plain parameter name at the end.
        state: Tensors of the optimizer state at the end, in order.
        history: ``(digest of all masks, live weights by name)`` after every batch.
    """

    model: pl.LightningModule
    trainer: pl.Trainer
    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    state: list[Tensor] = field(default_factory=list)
    history: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    @property
    def live(self) -> int:
        """Live weights at the end."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def changes(self) -> int:
        """How often the masks changed from one batch to the next."""
        digests = [digest for digest, _ in self.history]
        return sum(a != b for a, b in zip(digests, digests[1:], strict=False))

    def assert_equal(self, other: Result) -> None:
        """Raise ``AssertionError`` unless both trainings ended in the same bits."""
        for name in ("weights", "masks"):
            mine, theirs = getattr(self, name), getattr(other, name)
            assert mine.keys() == theirs.keys(), name
            for key in mine:
                assert torch.equal(mine[key], theirs[key]), f"{name}: {key}"
        assert len(self.state) == len(other.state)
        for place, (a, b) in enumerate(zip(self.state, other.state, strict=True)):
            assert torch.equal(a, b), f"optimizer state {place}"


class Probe(Callback):
    """Checks after every batch that nothing lives off the masks, and records the end."""

    def __init__(self) -> None:
        self.batches = 0
        self.history: list[tuple[str, dict[str, int]]] = []
        self.weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.state: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Check weights and optimizer state, record the masks."""
        self.batches += 1
        masks = _masks(trainer)
        if masks is not None:
            assert_zero_off_masks(masks, trainer.optimizers)
            self.history.append((masks.digest(), {p.name: p.live for p in masks}))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy what the training left behind."""
        masks = _masks(trainer)
        self.weights = {k: whole(v).clone() for k, v in pl_module.state_dict().items()}
        self.masks = {} if masks is None else {p.name: whole(p.mask).clone() for p in masks}
        self.state = [
            value.detach().clone()
            for optimizer in trainer.optimizers
            # dense, whatever the storage
            for state in optimizer.state_dict().get("state", {}).values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]


def assert_zero_off_masks(masks: Masks, optimizers: Sequence[Optimizer] = ()) -> None:
    """Raise ``AssertionError`` unless weights and optimizer state are +-0 off the masks.

    Of learned masks, whose latent weights live everywhere, the effective weights.
    """
    for kept in masks:
        mask = whole(kept.mask)
        assert int(mask.sum()) == kept.live, f"{kept.name}: stale count"
        assert not kept.weight[~mask].any(), f"{kept.name}: weight off the mask"
        for optimizer in optimizers if not kept.is_latent else ():
            if kept.compressed is not None:  # nothing is kept off the mask
                assert len(kept.parameter) == kept.live, f"{kept.name}: values"
                continue
            off = ~local(kept.mask)
            for tensor in optimizer_state(kept, optimizer):
                assert not tensor[off].any(), f"{kept.name}: optimizer state off the mask"


def quiet_trainer(callbacks: Sequence[Callback], **options: Any) -> pl.Trainer:
    """A Trainer on the CPU for 3 epochs, without logger, files and progress bar.

    Args:
        callbacks: Its callbacks.
        options: Other arguments of the Trainer, which replace these.
    """
    quiet: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=[*callbacks], **{**quiet, **options})


def fit(
    callbacks: Sequence[Callback],
    model: Callable[[], pl.LightningModule] = TinyModel,
    *,
    data: Any = None,
    seed: int = 3,
    ckpt_path: str | None = None,
    **trainer: Any,
) -> Result:
    """Train a tiny model on the CPU, checking the masks after every batch.

    Args:
        callbacks: The callbacks under test.
        model: Makes the module, after seeding.
        data: Training loader; default :class:`Batches`.
        seed: For ``seed_everything``.
        ckpt_path: Checkpoint to resume from.
        trainer: Arguments of the Trainer; default 3 epochs, no logger, no files.

    Returns:
        What the training left behind.
    """
    pl.seed_everything(seed, verbose=False)
    module = model()
    probe = Probe()
    made = quiet_trainer([*callbacks, probe], **trainer)
    made.fit(module, data if data is not None else Batches(), ckpt_path=ckpt_path)
    made_masks = probe.history or not probe.batches
    assert made_masks or not any(isinstance(c, Method) for c in callbacks), "no masks were seen"
    return Result(module, made, probe.weights, probe.masks, probe.state, probe.history)


def _masks(trainer: pl.Trainer) -> Masks | None:
    keeper = MaskKeeper.of(trainer)
    return keeper.masks if keeper is not None else None
