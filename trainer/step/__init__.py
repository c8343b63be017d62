"""One training step: its state, its two routes (`spec`, `sparse`), and the update."""

from winnow.trainer.step.cross_init import initialise_cross
from winnow.trainer.step.cross_train import train_cross
from winnow.trainer.step.recipe import Recipe, dead_after_rows, power_of_two_near
from winnow.trainer.step.report import StepReport
from winnow.trainer.step.sets import SetReport, SetRun, train_set
from winnow.trainer.step.state import Counts, Run
from winnow.trainer.step.train import train_step

__all__ = [
    "Counts",
    "Recipe",
    "Run",
    "SetReport",
    "SetRun",
    "StepReport",
    "dead_after_rows",
    "initialise_cross",
    "power_of_two_near",
    "train_cross",
    "train_set",
    "train_step",
]
