"""A small autoencoder in the Trainer of Lightning: 2:4 sparse for 70 % of the steps, then dense.

    pip install lightning
    python examples/trainers/lightning_module.py --out run
    python examples/trainers/lightning_module.py --out run --resume run/step=140.ckpt

The lines that make the training sparse are marked with [sparse].
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from semisparse import recipes  # [sparse]
from semisparse.integrations.lightning import SparseCallback  # [sparse]


class Autoencoder(pl.LightningModule):
    """Linear layers that reproduce their input through a narrow one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width // 2))
        self.decoder = nn.Sequential(nn.Linear(width // 2, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        return (self.decoder(self.encoder(batch[0])) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters: the swap keeps the Parameters, so nothing changes here."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train, with a checkpoint every tenth of the run, and print what the layers are in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", help="a checkpoint")
    options = parser.parse_args()

    torch.manual_seed(0)
    basis = torch.randn(options.width // 4, options.width)
    data = TensorDataset(torch.randn(4096, options.width // 4) @ basis)
    sparse = SparseCallback(recipes.safest())  # [sparse]
    trainer = pl.Trainer(
        max_steps=options.steps,
        accelerator=options.device,
        devices=1,
        precision="32-true" if options.device == "cpu" else "bf16-mixed",  # fp32 products are never sparse
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        callbacks=[
            sparse,  # [sparse]
            ModelCheckpoint(options.out, filename="{step}", every_n_train_steps=options.steps // 10, save_top_k=-1),
        ],
    )
    model = Autoencoder(options.width)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True), ckpt_path=options.resume)
    print(sparse.schedule)
    print(f"loss {model.cpu().training_step([data.tensors[0]], 0).item():.4f}")
    print(f"layers of the model: {sorted({type(module).__name__ for module in model.modules()})}")


if __name__ == "__main__":
    main()
