"""Fixtures of the tests of comparisons: runs of the training tests."""

from training.conftest import fresh_accelerate, photos, settings, train

__all__ = ["fresh_accelerate", "photos", "settings", "train"]
