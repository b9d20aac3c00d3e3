"""Losses: pure functions of logits and labels."""

from pixelwise.losses.pixel import cross_entropy, dice_loss
from pixelwise.losses.weights import class_weights

__all__ = ["class_weights", "cross_entropy", "dice_loss"]
