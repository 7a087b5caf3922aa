"""The demo model: its data, its training, its card, and the files themselves."""
