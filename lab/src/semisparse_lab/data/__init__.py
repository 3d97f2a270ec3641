"""Images and text to learn from."""
