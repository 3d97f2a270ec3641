"""Training one model: settings, loop, CUDA graph, measurements."""
