"""What stands around Hydra: overrides checked before it composes, its errors in our words, what pretrained weights fill in."""
