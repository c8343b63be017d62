"""The second stage: sparse autoencoders, trained from a dataset's rows. `Sae` is the way in."""

from trainer.sae import Sae

__all__ = ["Sae"]
