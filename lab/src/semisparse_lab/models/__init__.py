"""Small transformers made of plain nn.Linear layers."""
