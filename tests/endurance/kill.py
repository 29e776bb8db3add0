"""Kill trainings at random moments, resume them, and compare with what was never stopped.

    python tests/endurance/kill.py --cycles 200 --seed 0 --output kill.json

A cycle is one kill by SIGKILL and one resume from the newest checkpoint that the package does
not refuse. Kills come at any moment; in the middle of Lightning's own writing of a checkpoint;
in the middle of a writing in place, which leaves a file cut short; and at any moment, after
which one bit of the newest file is turned round. After every optimizer step, also of those
attempts that were killed, weights and masks must be those of the uninterrupted training, and in
the end the whole checkpoint: weights, optimizer state, schedulers, masks, slots, counters and
random states.

The program imports torch and Lightning once and forks a process per attempt, so it must not
itself train anything before.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from lightning_sparsity import (
    GMP,
    SET,
    SNFS,
    SNIP,
    STR,
    DeepR,
    ESPNFinetune,
    LotteryTicket,
    OptG,
    RedrGradientGlobal,
    RigL,
    SparseCompute,
)
from lightning_sparsity.core.keeper import MaskKeeper
from lightning_sparsity.testing import Batch, Batches, ManualModel, TinyModel, quiet_trainer

SAVE_EVERY = 3  # optimizer steps
MOST_KILLS = 12  # of one training
_SAVER = ModelCheckpoint.__name__
REFUSED, FAILED = 3, 4  # exit codes of an attempt


def adam(parameters: Any) -> Any:
    """Adam, and a learning rate that falls in every epoch."""
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def loss_of(model: TinyModel, batch: Batch) -> Tensor:
    """The loss to score by."""
    return model.loss(batch)


def with_adam() -> TinyModel:
    return TinyModel(optimizer=adam)


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        callbacks: Makes the callbacks under test.
        model: Makes the model, after seeding.
        epochs: Of 8 batches.
    """

    callbacks: Callable[[], list[Callback]]
    model: Callable[[], pl.LightningModule] = TinyModel
    epochs: int = 6


DENSE = {
    "RigL": Training(lambda: [RigL(0.3, update_interval=4)], with_adam),
    "SET": Training(lambda: [SET(0.3)]),
    "GMP": Training(lambda: [GMP(0.3, update_interval=4)], with_adam),
    "SNIP, RigL": Training(
        lambda: [SNIP(0.3, data=Batches(2), loss_fn=loss_of), RigL(update_interval=4)]
    ),
    "RedrGradientGlobal": Training(lambda: [RedrGradientGlobal(0.3)]),
    "DeepR": Training(lambda: [DeepR(0.3, temperature=1e-3)]),
    "SNFS": Training(lambda: [SNFS(0.3)], with_adam),
    "LotteryTicket": Training(lambda: [LotteryTicket(0.3, rounds=2, round_epochs=2)]),
    "RigL by hand": Training(lambda: [RigL(0.3, update_interval=4)], ManualModel),
}
LEARNED = {
    "OptG": Training(lambda: [OptG(0.3, alpha=1.0, update_interval=4)], with_adam),
    "STR": Training(lambda: [STR(s_init=-5.0, weight_decay=0.1)]),
    "ESPNFinetune": Training(
        lambda: [ESPNFinetune(density=0.3, alpha=1.2, joint_lr=0.1, tune_epochs=2)]
    ),
}


def compressed(training: Training) -> Training:
    """The same with compressed weights."""
    return replace(training, callbacks=lambda: [*training.callbacks(), SparseCompute("csr")])


TRAININGS: dict[str, Training] = {
    **DENSE,
    **LEARNED,
    **{f"{name} (csr)": compressed(training) for name, training in DENSE.items()},
}

# ------------------------------------------------------------------- the process to be killed


@dataclass(frozen=True)
class Fate:
    """How an attempt dies by itself.

    Args:
        kind: "writing": in Lightning's writing of a file; "cut short": in writing in place;
            anything else: it does not.
        save: At which checkpoint of the attempt.
        share: After which share of the bytes; of 1: when all are written, but not moved.
    """

    kind: str = "moment"
    save: int = 0
    share: float = 0.0


class Dying(TorchCheckpointIO):
    """Writes checkpoints until fate comes."""

    def __init__(self, fate: Fate) -> None:
        self._fate = fate
        self._saves = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kw: Any) -> None:
        self._saves += 1
        if self._saves == self._fate.save and self._fate.kind == "cut short":
            data = io.BytesIO()
            torch.save(checkpoint, data)
            Path(path).write_bytes(self._part(data.getvalue()))
            die()
        if self._saves == self._fate.save and self._fate.kind == "writing":
            self._die_in_writing()
        super().save_checkpoint(checkpoint, path, *args, **kw)

    def _part(self, data: bytes) -> bytes:
        return data[: int(len(data) * self._fate.share)]

    def _die_in_writing(self) -> None:
        """Let the file that is opened next be the last."""

        def write(opened: LocalFileOpener, data: bytes) -> None:
            opened.f.write(self._part(data))
            opened.f.flush()
            if self._fate.share < 1:
                die()

        LocalFileOpener.write = write
        LocalFileOpener.commit = lambda opened: die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Record(Callback):
    """Writes a line per optimizer step.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        keeper = MaskKeeper.of(trainer)
        assert keeper is not None
        assert keeper.masks is not None
        where = f"{trainer.global_step} epoch {trainer.current_epoch} batch {batch_idx}"
        line = f"{where} weights {digest(pl_module)} masks {keeper.masks.digest()}\n"
        os.write(self._file, line.encode())


class Within(ModelCheckpoint):
    """Saves in the middle of epochs only.

    After a resume from a file that was saved with the last batch of an epoch, Lightning 2.6
    counts epochs wrongly: a second resume trains too long, sparse or dense.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def digest(model: torch.nn.Module) -> str:
    """A hash of all parameters and buffers."""
    total = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def attempt(training: Training, folder: Path, resume: Path | None, fate: Fate, place: int) -> None:
    """Train to the end, or until fate comes."""
    pl.seed_everything(3, verbose=False)
    record = Record(folder / f"{place}.steps")
    within = Within(
        folder, filename="{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1, save_last=True
    )
    between = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(
        [*training.callbacks(), record, within, between],
        max_epochs=training.epochs,
        enable_checkpointing=True,
        plugins=[Dying(fate)],
    )
    model = training.model()
    trainer.fit(model, Batches(), ckpt_path=resume)
    (folder / "after").write_text(digest(model))


def forked(task: Callable[[], None], log: Path) -> int:
    """Run a task in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
        tempfile.tempdir = str(log.parent)  # where Lightning writes before it moves
        warnings.simplefilter("ignore")
        task()
        code = 0
    except BaseException as error:
        traceback.print_exc()
        if "is damaged" in str(error):
            code = REFUSED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ------------------------------------------------------------------------------- the driver


@dataclass
class Counts:
    """What happened to one training.

    Args:
        trainings: Ended ones.
        kills: Of each kind.
        resumes: From a checkpoint.
        restarts: From nothing, because no checkpoint was left.
        refused: Damaged files that the package refused.
        harmless: Flipped bytes in files that it took.
        steps: Optimizer steps compared.
        failed: What went wrong.
    """

    trainings: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    restarts: int = 0
    refused: int = 0
    harmless: int = 0
    steps: int = 0
    failed: list[str] = field(default_factory=list)


class Driver:
    """Kills and resumes one training after another.

    Args:
        names: Which of :data:`TRAININGS`.
        seed: Of kinds and moments.
        folder: Where everything is written.
    """

    def __init__(self, names: Sequence[str], seed: int, folder: Path) -> None:
        self._chance = random.Random(seed)
        self._folder = folder
        self._references: dict[str, tuple[Path, dict[str, str], float]] = {}
        self.counts = {name: Counts() for name in names}

    @property
    def cycles(self) -> int:
        """Kills that were followed by another attempt."""
        return sum(counts.kills.total() for counts in self.counts.values())

    def run(self, cycles: int) -> None:
        """Train in turn until there were so many kills."""
        while self.cycles < cycles:
            for name, counts in self.counts.items():
                self._train(name, counts, cycles)
                print(f"{self.cycles:5} kills  {name}", flush=True)

    def _reference(self, name: str) -> tuple[Path, dict[str, str], float]:
        """The uninterrupted training: its folder, its steps, how long it took."""
        if name not in self._references:
            folder = self._folder / f"{len(self._references)} uninterrupted"
            folder.mkdir()
            begin = time.perf_counter()
            self._attempt(name, folder, None, Fate(), 0, None)
            taken = time.perf_counter() - begin
            if not (folder / "after").exists():
                raise RuntimeError(f"{name} cannot be trained:\n{(folder / 'log').read_text()}")
            self._references[name] = folder, _steps(folder / "0.steps"), taken
        return self._references[name]

    def _train(self, name: str, counts: Counts, cycles: int) -> None:
        """One training to its end, killed now and then."""
        reference, steps, taken = self._reference(name)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        flipped: Path | None = None
        place = kills = 0
        while True:
            resume = _newest(folder)
            may_die = kills < MOST_KILLS and self.cycles < cycles
            fate, moment = self._draw(taken) if may_die else (Fate(), None)
            status = self._attempt(name, folder, resume, fate, place, moment)
            code = os.waitstatus_to_exitcode(status)
            if code == REFUSED and resume is not None:
                counts.refused += 1
                resume.unlink()
                continue
            counts.harmless += resume is not None and resume == flipped
            counts.resumes += place > 0 and resume is not None
            counts.restarts += place > 0 and resume is None
            for step, found in _steps(folder / f"{place}.steps").items():
                counts.steps += 1
                if steps.get(step) != found:
                    after = resume.name if resume else "nothing"
                    said = f"resumed from {after}: step {step} {found}, not {steps.get(step)}"
                    counts.failed.append(said)
                    break
            place += 1
            if code != -signal.SIGKILL:
                break
            counts.kills[fate.kind] += 1
            kills += 1
            flipped = self._flip(_newest(folder)) if fate.kind == "flipped" else None
        if code:
            counts.failed.append(f"exit code {code}: {(folder / 'log').read_text()[-2000:]}")
        else:
            counts.trainings += 1
            counts.failed += _compare(folder, reference)
        if not counts.failed:
            shutil.rmtree(folder)

    def _draw(self, taken: float) -> tuple[Fate, float | None]:
        """A kind of death and, if somebody else has to kill, when."""
        kind = self._chance.choice(["moment", "moment", "writing", "cut short", "flipped"])
        if kind in ("moment", "flipped"):
            return Fate(kind), self._chance.uniform(0, taken)
        share = self._chance.choice([self._chance.random(), self._chance.random(), 1.0])
        if kind == "cut short":
            share = self._chance.random()
        return Fate(kind, self._chance.randint(1, 12), share), None

    def _attempt(
        self,
        name: str,
        folder: Path,
        resume: Path | None,
        fate: Fate,
        place: int,
        moment: float | None,
    ) -> int:
        """One process, killed after so many seconds; its wait status."""
        task = lambda: attempt(TRAININGS[name], folder, resume, fate, place)  # noqa: E731
        child = forked(task, folder / "log")
        if moment is not None:
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still its own
        return os.waitpid(child, 0)[1]

    def _flip(self, path: Path | None) -> Path | None:
        """Turn one bit of a file round, and leave its time as it was."""
        if path is None:
            return None
        times = path.stat()
        data = bytearray(path.read_bytes())
        if data:
            data[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return path


def _newest(folder: Path) -> Path | None:
    """The checkpoint that was written last, whole or not."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return found[-1] if found else None


def _steps(path: Path) -> dict[str, str]:
    """What was written after each step; a last line without its end is left out."""
    if not path.exists():
        return {}
    lines = path.read_text().split("\n")[:-1]
    return dict(line.split(" ", 1) for line in lines)


def _compare(folder: Path, reference: Path) -> list[str]:
    """What differs between the last checkpoints, and after them."""
    last = [_newest(folder), _newest(reference)]
    mine, other = (torch.load(path, weights_only=True) for path in last if path is not None)
    found = _differences(_comparable(mine), _comparable(other))
    if (folder / "after").read_text() != (reference / "after").read_text():
        found.append("the model after fit")
    return found


def _comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without names of files and without why weights are compressed.

    And without epochs, as Lightning counts one more after a training that had ended.
    """
    callbacks = checkpoint["callbacks"]
    own = {
        key: callbacks[key] for key in callbacks if not key.startswith((Within.__name__, _SAVER))
    }
    keeper = {k: v for k, v in own[MaskKeeper.__name__].items() if k != "storage"}
    rest = {key: checkpoint[key] for key in checkpoint if key not in ("epoch", "loops")}
    return {**rest, "callbacks": {**own, MaskKeeper.__name__: keeper}}


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places at which two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in _differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (x, y) in pairs for found in _differences(x, y, f"{where}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if type(a) is type(b) and a == b else [f"{where}: {str(a)[:80]} != {str(b)[:80]}"]


def summary(driver: Driver, seed: int, seconds: float) -> dict[str, Any]:
    """All counts, plain."""
    by_name = {name: vars(counts) for name, counts in driver.counts.items()}
    kills: Counter[str] = sum((counts.kills for counts in driver.counts.values()), Counter())
    total = {
        key: sum(counts[key] for counts in by_name.values())
        for key in ("trainings", "resumes", "restarts", "refused", "harmless", "steps")
    }
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "seed": seed,
        "seconds": round(seconds, 1),
        "cycles": driver.cycles,
        "kills": dict(kills),
        **total,
        "failed": sum(len(counts["failed"]) for counts in by_name.values()),
        "by_training": {
            name: {**counts, "kills": dict(counts["kills"])} for name, counts in by_name.items()
        },
    }


def table(found: dict[str, Any]) -> str:
    """The counts, line by line."""
    columns = ("trainings", "resumes", "restarts", "refused", "harmless", "steps")
    lines = [f"{'':28}{'kills':>10}" + "".join(f"{column:>10}" for column in columns) + "  failed"]
    rows = {**found["by_training"], "all": found}
    for name, counts in rows.items():
        failed = counts["failed"] if isinstance(counts["failed"], int) else len(counts["failed"])
        numbers = "".join(f"{counts[column]:>10}" for column in columns)
        lines.append(f"{name:28}{sum(counts['kills'].values()):>10}{numbers}{failed:>8}")
    said = ", ".join(f"{number} {kind}" for kind, number in sorted(found["kills"].items()))
    return "\n".join([*lines, f"kills: {said}; {found['seconds']} s"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cycles", type=int, default=200, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--output", type=Path, help="JSON file of the counts")
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    driver = Driver(asked.only, asked.seed, folder)
    begin = time.perf_counter()
    driver.run(asked.cycles)
    found = summary(driver, asked.seed, time.perf_counter() - begin)
    print(table(found))
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=1) + "\n")
    for name, counts in driver.counts.items():
        for said in counts.failed:
            print(f"{name}: {said}", file=sys.stderr)
    if found["failed"]:
        print(f"what failed is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
