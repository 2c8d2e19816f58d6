"""The same architecture in other libraries. Each takes tokens and targets (B, T) and returns the mean loss in nats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from machinery.huggingface.families import to_hf_config
from tools.common import lm

# Grouped queries, RoPE, SwiGLU, RMSNorm, tied embeddings, no biases, no QK-norm: what all of them can be set to.
MODELS = {
    "demo": {"preset": "demo", "micro_batch": 8},
    "22M": {
        "n_layer": 6, "n_embd": 384, "n_head": 6, "n_kv_head": 2, "n_ffn": 1024, "block_size": 256,
        "vocab_size": 32768, "batch_tokens": 1024, "micro_batch": 4,
    },
    "100M": {
        "n_layer": 12, "n_embd": 768, "n_head": 12, "n_kv_head": 4, "n_ffn": 2048, "block_size": 256,
        "vocab_size": 32768, "batch_tokens": 1024, "micro_batch": 4,
    },
    "day": {"micro_batch": 16, "batch_tokens": 524288},
    "tiny": {"preset": "smoke", "n_head": 2, "n_kv_head": 1, "micro_batch": 2},  # for the tests
}  # fmt: skip


def make_config(name: str, **overrides):
    """The Config of one of MODELS, without what a Llama does not have."""
    plain = {"qk_norm": False, "embedding_norm": False, "induction": False}
    values = MODELS[name] | plain | {"optimizer": "adamw", "max_hours": 1.0} | overrides
    return lm.Config.from_preset(values.pop("preset", "day"), **values)


class Transformers(nn.Module):
    """What `transformers` has for a config, with its own loss: of those below a Llama, with QK-norm a Qwen3."""

    def __init__(self, config) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(to_hf_config(config.to_dict()), attn_implementation="sdpa")

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss


class XTransformers(nn.Module):
    """x-transformers, with the loss of its AutoregressiveWrapper. Its RoPE turns neighbouring channels, at equal cost.

    Its gated feed-forward has a bias that no option turns off; it is taken out here.
    """

    def __init__(self, config) -> None:
        super().__init__()
        from x_transformers import Decoder, TransformerWrapper
        from x_transformers.x_transformers import GLU

        self.model = TransformerWrapper(
            num_tokens=config.vocab_size, max_seq_len=config.positions, use_abs_pos_emb=False, tie_embedding=True,
            attn_layers=Decoder(
                dim=config.n_embd, depth=config.n_layer, heads=config.n_head, attn_dim_head=config.head_size,
                attn_kv_heads=config.n_kv_head, attn_flash=True, rotary_pos_emb=True, rotary_emb_dim=config.head_size,
                use_rmsnorm=True, ff_swish=True, ff_glu=True, ff_no_bias=True,
                ff_mult=(config.n_ffn + 0.5) / config.n_embd,
            ),
        )  # fmt: skip
        for module in self.model.modules():
            if isinstance(module, GLU):
                module.proj.bias = None

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1).float(), targets.flatten())
