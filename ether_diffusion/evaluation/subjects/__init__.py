"""Benchmarks: many subjects, many methods, and scores of pictures that exist already."""
