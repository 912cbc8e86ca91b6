"""Models small enough to try everything on a laptop, built from the real classes."""
