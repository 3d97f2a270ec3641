"""Making linear layers semi-sparse and dense again, in place."""
