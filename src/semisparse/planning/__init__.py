"""What pays: which linear layers of a model gain from 2:4 or fp8, measured. The public face is semisparse.plan."""
