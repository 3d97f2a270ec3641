"""The main job and its parts: model, data, training loop, checkpoint, report. The examples import them too."""
