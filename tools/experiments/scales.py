"""What the findings have in common, at a scale for two CPU cores and at one for a CUDA card (which is unmeasured)."""

CPU = {
    "source": "python", "vocab_size": 512, "val_fraction": 0.05, "block_size": 128, "batch_tokens": 1024,
    "micro_batch": 8, "lr": 0.015, "embedding_lr": 0.015, "head_lr": 0.015, "weight_decay": 0.0, "warmup": 0.02,
    "eval_every": 10**9, "eval_tokens": 16384, "checkpoint_every": 500, "dtype": "float32",
}  # fmt: skip
GPU = {
    "source": "python+site", "vocab_size": 8192, "val_fraction": 0.01, "block_size": 512, "batch_tokens": 32768,
    "micro_batch": "auto", "lr": 0.015, "embedding_lr": 0.015, "head_lr": 0.015, "weight_decay": 0.0, "warmup": 0.02,
    "eval_every": 10**9, "eval_tokens": 131072, "checkpoint_every": 1000, "compile": True, "dtype": "auto",
}  # fmt: skip
