"""A small Llama over bytes in the Trainer of transformers: 2:4 sparse for 70 % of the steps, then dense.

    pip install transformers accelerate
    python examples/trainers/huggingface.py --out run             # the source of Python's own standard library
    python examples/trainers/huggingface.py --out run --resume    # from the last checkpoint in run

The lines that make the training sparse are marked with [sparse].
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from semisparse import recipes  # [sparse]
from semisparse.integrations.huggingface import SparseCallback  # [sparse]


def rows(context: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of source text as token numbers, which are bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    pieces = text[: len(text) // context * context].view(-1, context)[:count]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    """Train, save a plain model, and load it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of checkpoints and of the model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.depth,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    arguments = TrainingArguments(
        options.out,
        max_steps=options.steps,
        save_steps=options.save_steps,
        logging_steps=max(1, options.steps // 10),
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=options.device == "cpu",
        bf16=options.device != "cpu",  # fp32 products are never sparse
    )
    sparse = SparseCallback(recipes.safest(), select="mlp")  # [sparse] lm_head and attention stay dense
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=rows(options.context, 16 * options.steps),
        callbacks=[sparse],  # [sparse]
    )
    trainer.train(resume_from_checkpoint=options.resume)
    print(sparse.schedule)

    trainer.save_model(options.out)  # plain: nothing in it says that it was ever sparse
    plain = LlamaForCausalLM.from_pretrained(options.out).to(options.device)
    batch = {name: value[None].to(options.device) for name, value in rows(options.context, 1)[0].items()}
    with torch.inference_mode():
        print(f"loaded without semisparse: loss {plain(**batch).loss.item():.3f}")


if __name__ == "__main__":
    main()
