"""The adapter on any model: functional, methods, targets, rows, linear, host."""
