"""Adapters side by side for a reader's eye: one page, blind where it is wanted, and the wins that readers gave."""
