"""Sparse training without code: everything is in the config file.

Run ``python examples/cli.py fit --config examples/rigl.yaml``. Every argument can be given
on the command line too, such as ``--trainer.max_epochs 5``.
"""

from lightning.pytorch.cli import LightningCLI
from quickstart import Digits, DigitsData

if __name__ == "__main__":
    LightningCLI(Digits, DigitsData)
