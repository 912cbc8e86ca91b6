"""The pictures that training sees: subject folders, augmentation, batches, caches."""
