"""Sparse training without code: everything is in the config file.

Run ``python examples/cli.py fit --config examples/rigl.yaml``. Arguments can be given on the
command line too, such as ``--trainer.max_epochs 5``. Callbacks are a list, which a later
``--trainer.callbacks='[...]'`` (JSON) or a second ``--config`` replaces as a whole.
"""

from lightning.pytorch.cli import LightningCLI
from quickstart import Digits, DigitsData

if __name__ == "__main__":
    LightningCLI(Digits, DigitsData)
