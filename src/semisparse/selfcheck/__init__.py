"""The self-check of a machine behind `semisparse bench`: what is right here, what was found, and what it is worth."""
