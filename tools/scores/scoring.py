"""What a model makes of given text: loss by place, multiple choice, whole documents.

The same sums as EleutherAI's lm_eval (`make scores` compares the two). A model takes tokens (B, T) and returns logits
(B, T, V); `machine` is the `Machine` it is on.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor, nn

from data_utils import TokenData
from machinery.errors import UserError, told
from machinery.machine import Machine
from machinery.tokenizers import decode_text
from model_utils import evaluation_mode
from tools.scores.parsing import held_out_functions, parses
from tools.scores.questions import encode_pair

BATCH = 8  # sequences at a time


@torch.no_grad()
def token_losses(model: nn.Module, tokens: Tensor, targets: Tensor, machine: Machine) -> Tensor:
    """Loss in nats of each of targets (B, T), on the CPU; 0 for targets of -100."""
    with evaluation_mode(model), machine.autocast():
        logits = model(tokens.to(machine.device)).float()  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(machine.device), reduction="none")
    return losses.view_as(targets).cpu().double()


def held_out_losses(model: nn.Module, data: TokenData, machine: Machine, tokens: float) -> Tensor:
    """(N, T) loss in nats of each token of N windows, about `tokens` held-out tokens in all, spread evenly."""
    losses = []
    for inputs, targets in data.held_out(tokens, BATCH, machine):
        scored = targets[:, 0] != -100  # other rows only fill the batch up
        losses.append(token_losses(model, inputs[scored], targets[scored], machine))
    return torch.cat(losses)


def loss_by_position(model: nn.Module, data: TokenData, machine: Machine, tokens: float) -> Tensor:
    """(T,) loss in nats at each place of a window, the mean over about `tokens` held-out tokens, spread evenly."""
    return held_out_losses(model, data, machine, tokens).mean(0)


def simple_models(data: TokenData, block_size: int) -> dict[str, float]:
    """Bits per byte of up to a million held-out tokens without a network: what a model's are to be held against.

    Tokens and pairs of them are counted in up to three million tokens of training text; a pair not seen there counts as
    its second token does (MacKay and Peto 1995, a hierarchical Dirichlet language model).
    """
    known, new = (
        torch.from_numpy(windows.read(0, min(len(windows), max(1, most // block_size)))).long()  # (N, T + 1)
        for windows, most in [
            (data.windows("train", block_size, 0), 3_000_000), (data.windows("val", block_size), 1_000_000)
        ]
    )  # fmt: skip
    V, size, text = data.encoding.n_vocab, data.bytes_of(new[:, 1:]), new[:, 1:].flatten().tolist()
    alone = (known[:, 1:].flatten().bincount(minlength=V) + 1.0)[new[:, 1:]] / (known[:, 1:].numel() + V)
    pairs, counts = (known[:, :-1] * V + known[:, 1:]).unique(return_counts=True)
    asked = new[:, :-1] * V + new[:, 1:]
    place = torch.searchsorted(pairs, asked).clamp(max=len(pairs) - 1)
    seen, first = counts[place] * (pairs[place] == asked), known[:, :-1].flatten().bincount(minlength=V)[new[:, :-1]]
    bits = {"all tokens alike": torch.full(alone.shape, 1 / V), "by how often each occurs": alone}
    bits["by what followed the token before"] = (seen + 100 * alone) / (first + 100)
    packed = packed_bits(data.encoding.decode_bytes(text))
    return {name: -p.double().log2().sum().item() / size for name, p in bits.items()} | {"packed by xz": packed / size}


def packed_bits(text: bytes) -> int:
    """Bits of a text as the packer xz stores it, which has read no other."""
    return 8 * len(lzma.compress(text, preset=9))


def _check_block_size(model: nn.Module, block_size: int) -> None:
    most = getattr(model, "max_length", 1 << 40)  # models of other libraries do not say
    if type(block_size) is not int or not 0 < block_size <= most:
        raise UserError(f"block_size is {block_size!r}; give a whole number of tokens from 1 to {most}")


def log_likelihoods(
    model: nn.Module, pairs: list[tuple[list[int], list[int]]], block_size: int, machine: Machine
) -> list[Tensor]:
    """ln p of each token of the continuation, for pairs (context, continuation) of token lists; their sum is that of
    the whole continuation. A context too long loses its beginning.

    Rows are context and continuation; the targets in the context are -100, which is not scored. Raises `UserError` for
    a continuation that does not fit in `block_size` tokens.
    """
    _check_block_size(model, block_size)
    found = [torch.empty(0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))  # equal lengths together: little padding
    for first in range(0, len(pairs), BATCH):
        chosen, tokens, targets = order[first : first + BATCH], [], []
        for context, continuation in (pairs[i] for i in chosen):
            n = len(continuation)
            if not 0 < n <= block_size:
                raise UserError(f"a continuation has {n} tokens and block_size is {block_size}; shorten it")
            row = torch.tensor((context + continuation)[-(block_size + 1) :])
            tokens.append(row[:-1])
            targets.append(row[1:].masked_fill(torch.arange(len(row) - 1) < len(row) - 1 - n, -100))
        tokens, targets = (
            nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
            for rows, padding in [(tokens, 0), (targets, -100)]
        )
        for i, losses, scored in zip(chosen, token_losses(model, tokens, targets, machine), targets != -100):
            found[i] = -losses[scored]
    return found


def score_choices(
    model: nn.Module, encoding: Encoding, questions: list[dict], block_size: int, machine: Machine
) -> dict[str, float]:
    """Accuracies with their standard errors, and that of a guess, for questions with "ctx", "endings" and "label".

    "acc" takes the ending of highest likelihood, "acc_norm" that of highest likelihood per character.
    """
    pairs = [encode_pair(encoding, q["ctx"], " " + ending) for q in questions for ending in q["endings"]]
    sums = torch.stack([ln_p.sum() for ln_p in log_likelihoods(model, pairs, block_size, machine)])
    sums = sums.split([len(q["endings"]) for q in questions])
    right = {"acc": 0, "acc_norm": 0}
    for question, ln_p in zip(questions, sums):
        lengths = torch.tensor([len(ending) for ending in question["endings"]])
        right["acc"] += ln_p.argmax().item() == question["label"]
        right["acc_norm"] += (ln_p / lengths).argmax().item() == question["label"]
    n, scores = len(questions), {"chance": sum(1 / len(q["endings"]) for q in questions) / len(questions)}
    for name, count in right.items():
        scores[name], scores[f"{name}_stderr"] = count / n, math.sqrt(count / n * (1 - count / n) / max(1, n - 1))
    return scores


def document_windows(ids: list[int], block_size: int) -> list[tuple[list[int], list[int]]]:
    """A document's ids, the end-of-text token before it first, as (context, continuation) pairs: each id once.

    The last, short window is filled up with earlier ids as context (a rolling log-likelihood).
    """
    pairs = []
    for start in range(1, len(ids), block_size):
        stop = min(start + block_size, len(ids))
        pairs.append((ids[max(0, stop - block_size - 1) : start], ids[start:stop]))
    return pairs


def _windows(model: nn.Module, encoding: Encoding, texts: list[str], block_size: int) -> tuple[list, int]:
    """Pairs that predict each token of the texts once, and how many bytes those have. `UserError` without a text."""
    if not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts) and any(texts)):
        raise UserError(f"texts are {texts!r:.80}; give a list of strings, one of them not empty")
    _check_block_size(model, block_size)
    with told("texts", problem="not text", advice="leave that character out"):  # half of a surrogate pair
        size = sum(len(text.encode()) for text in texts)
    documents = ([encoding.eot_token, *encoding.encode_ordinary(text)] for text in texts)
    return [pair for ids in documents for pair in document_windows(ids, block_size)], size


def score_documents(
    model: nn.Module, encoding: Encoding, texts: list[str], block_size: int, machine: Machine
) -> dict[str, float]:
    """Bits per byte of whole documents, every token of which is predicted once. Raises `UserError` without a text."""
    pairs, size = _windows(model, encoding, texts, block_size)
    nats = -torch.cat(log_likelihoods(model, pairs, block_size, machine)).sum().item()
    return {"bits_per_byte": nats / math.log(2) / size}


def score_tokens(
    model: nn.Module, encoding: Encoding, text: str, block_size: int, machine: Machine
) -> list[tuple[str, float]]:
    """The tokens of a document, as text, each with its loss in nats. Raises `UserError` without a text."""
    pairs, _ = _windows(model, encoding, [text], block_size)
    nats = [-ln_p for part in log_likelihoods(model, pairs, block_size, machine) for ln_p in part.tolist()]
    tokens = [token for _, continuation in pairs for token in continuation]
    return [(decode_text(encoding, [token]), loss) for token, loss in zip(tokens, nats)]


def parse_share(model: nn.Module, data: TokenData, machine: Machine, generate: Callable) -> dict[str, float]:
    """The share of held-out functions that Python parses, as the model has written them on ("written") and as they
    were, cut at the same places ("real"); {} for text that is not Python.

    `generate(model, tokens, n_new, n_vocab=…)` continues tokens (B, T), as the notebook's does.
    """
    length = min(72, model.max_length)  # a few lines of code
    given = max(1, length // 9)  # enough for the first line
    functions = torch.from_numpy(held_out_functions(data, 16, length)).to(machine.device)  # (B, length)
    if not len(functions):
        return {}
    with machine.autocast(decoding=True):
        written = generate(model, functions[:, :given], length - given, n_vocab=data.encoding.n_vocab)
    shares = {}
    for name, rows in {"written": written.tolist(), "real": functions.tolist()}.items():
        texts = [[decode_text(data.encoding, part) for part in (row[:given], row[given:])] for row in rows]
        shares[name] = sum(parses(*text) for text in texts) / len(texts)
    return shares
