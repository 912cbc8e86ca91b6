"""Whole studies: train, draw and score many subjects with many methods."""
