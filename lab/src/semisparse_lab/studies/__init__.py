"""The lab's experiments: what each compares, with which settings."""
