"""Products with one 2:4 operand: the problem, cuSPARSELt and the engine that drives it, masked dense, the autotuner."""
