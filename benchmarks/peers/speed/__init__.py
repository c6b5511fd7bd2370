"""What a training step takes under each way to prepare its batches, measured; see ``__main__``."""
