"""How `torchstage.ops` works: byte spans, FarmHash, decimal text. NumPy on CPU data, in blocks, with the lock released."""
