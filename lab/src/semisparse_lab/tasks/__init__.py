"""What is learned: batches, losses and scores."""
