"""Losses: pure functions of logits and labels."""

from pixelwise.losses.enlarged import enlarged_cross_entropy
from pixelwise.losses.pixel import cross_entropy, dice_loss
from pixelwise.losses.weights import class_weights

__all__ = ["class_weights", "cross_entropy", "dice_loss", "enlarged_cross_entropy"]
