"""Generation with the key/value cache: new tokens per second against `transformers.generate`, greedy in both."""

from __future__ import annotations

import torch

from tools.bench.common import take_turns
from tools.bench.peers import Transformers, make_config
from tools.common import lm


def compare_generation(
    machine, model_name: str, batches=(1, 16), n_prompt: int = 32, n_new: int = 128, rounds: int = 5
) -> list[dict]:
    """A row per batch size: tokens per second of both, and how ours compares."""
    config = make_config(model_name)
    ours = lm.build_model(config).to(machine.device).eval()
    theirs = Transformers(config).model.to(machine.device).eval()
    rows = []
    for batch in batches:
        prompt = torch.randint(config.vocab_size, (batch, n_prompt), device=machine.device)

        def with_ours(prompt=prompt) -> None:
            with machine.autocast():
                lm.generate(ours, prompt, n_new, temperature=0)

        def with_theirs(prompt=prompt) -> None:
            mask = torch.ones_like(prompt)
            with machine.autocast():
                theirs.generate(prompt, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0)

        seconds = take_turns({"ours": with_ours, "transformers": with_theirs}, machine, rounds)
        rates = {name: batch * n_new / taken for name, taken in seconds.items()}
        row = {"model": model_name, "precision": str(machine.dtype)[6:], "batch": batch}
        row |= {"LMHarness tokens/s": rates["ours"], "transformers tokens/s": rates["transformers"]}
        rows.append(row | {"ours is faster by": rates["ours"] / rates["transformers"]})
    return rows
