"""A run: its folder, record, curves, scores, report and model card."""
