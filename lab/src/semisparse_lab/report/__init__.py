"""Results as tables, cards and curves."""
