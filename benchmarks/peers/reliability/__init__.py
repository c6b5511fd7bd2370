"""What loaders do when something goes wrong, measured; see ``__main__``."""
