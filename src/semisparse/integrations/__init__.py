"""semisparse in other packages' trainers, one module per package; each imports its package, this file imports none."""
