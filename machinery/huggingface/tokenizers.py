"""Tokenizers leave and enter as Hugging Face `tokenizers` files: the same ids, in the format other programs read.

tiktoken merges, among neighbouring pieces, the two whose union has the lowest id. A `tokenizers` file lists the merges
instead, each as a pair of pieces. Going out, all pairs are listed, as in the file of Llama 3. Coming in, the pair that
makes each token has to be among those listed.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from machinery.errors import DataError, told
from machinery.files import read_json, write_json
from machinery.tokenizers import (
    BYTES_PATTERN,
    END_OF_TEXT,
    PROBE,
    SPLIT_PATTERN,
    tokenizer_from_dict,
    tokenizer_to_dict,
)

# Patterns that cut text into pieces, known to mean the same to both libraries. GPT-2's, as its `tokenizers` file says
# it by "ByteLevel", and as tiktoken does; Llama 3's, which is GPT-4's and ours; Qwen's, which keeps digits apart.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
KNOWN_PATTERNS = (SPLIT_PATTERN, QWEN_PATTERN, GPT2_PATTERN, BYTES_PATTERN, r50k_pat_str)
LONGEST_TOKEN = 1000  # bytes; the longest ones of published vocabularies have a few hundred


def for_oniguruma(pattern: str) -> str:
    """The pattern for `tokenizers`, where {1,3}+ repeats {1,3} and $ is the end of a line; tiktoken means neither."""
    return pattern.replace("{1,3}+", "{1,3}").replace("$", r"\z")


def byte_letters() -> list[str]:
    """The letter for each byte in a byte-level file: itself where it prints (GPT-2's `bytes_to_unicode`)."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def recover_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The pieces that byte pairs reach before `token` itself is made: two, unless only a whole piece can be it."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        rank, at = min((ranks.get(a + b, ranks[token]), at) for at, (a, b) in enumerate(pairwise(pieces)))
        if rank >= ranks[token]:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose union is a token, by the id of the union: the order in which tiktoken merges."""
    cuts = ((token[:at], token[at:]) for token in sorted(ranks, key=ranks.get) for at in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in ranks and right in ranks]


def to_tokenizers(encoding: tiktoken.Encoding):
    """`encoding` as a `tokenizers.Tokenizer` that gives the same ids. Raises `DataError` where it would not.

    Special tokens written in a text are special to it, unless its `encode_special_tokens` is set, which makes it
    `encoding.encode_ordinary`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    ranks = encoding._mergeable_ranks
    name = {token: "".join(letters[byte] for byte in token) for token in ranks}
    special = dict(sorted(encoding._special_tokens.items(), key=lambda item: item[1]))
    vocabulary = {name[token]: rank for token, rank in ranks.items()}
    if list(special.values()) != list(range(len(ranks), len(ranks) + len(special))):
        vocabulary |= special  # ids with gaps between them: the file has to name each
    merges = [(name[left], name[right]) for left, right in merges_of(ranks)]
    # Pieces are looked up whole first, as tiktoken does
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    into_pieces = pre_tokenizers.Split(Regex(for_oniguruma(encoding._pat_str)), behavior="isolated")
    into_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([into_pieces, into_letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    same_ids(encoding, tokenizer)
    return tokenizer


def same_ids(encoding: tiktoken.Encoding, tokenizer) -> None:
    """Raise `DataError` unless both give the same ids for a text with something of everything."""
    for text in (PROBE, PROBE * 3 + "  \n \t 12345", "I'LL we'Ve  \r\n\r\n   x\n \n"):
        ours = encoding.encode(text, allowed_special="all")
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise DataError(
                f"tokenizer {encoding.name!r} gives {ours[:8]}… for {text[:12]!r}… and as a tokenizers file"
                f" {theirs[:8]}…: its pattern {encoding._pat_str!r} means something else there"
            )
    if tokenizer.token_to_id(END_OF_TEXT) not in (None, encoding.eot_token):
        raise DataError(f"{END_OF_TEXT} is {encoding.eot_token} here and {tokenizer.token_to_id(END_OF_TEXT)} there")


def save_tokenizer(encoding: tiktoken.Encoding, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json. What `AutoTokenizer` loads from it is `encoding.encode_ordinary`.

    Training documents are text and nothing else, so an end-of-text written in one is text: "split_special_tokens".
    """
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=to_tokenizers(encoding),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # what is generated follows the prompt, not the padding
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # under the class name that versions before 5 know too
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def read_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """The tokenizer of a Hugging Face folder as an encoding with the same ids.

    Where none of its special tokens is called END_OF_TEXT, the one that its tokenizer_config.json calls "eos_token" is.
    Raises `DataError`, naming the part in the way, for anything but byte-level BPE with a known pattern.
    """
    import tokenizers

    folder, path = Path(folder), Path(folder) / "tokenizer.json"
    with told(path, DataError, "not a byte-level BPE"):
        raw = _byte_level_bpe(read_json(path), path)
        encoding = tokenizer_from_dict(tokenizer_to_dict(raw), path)
        loaded = tokenizers.Tokenizer.from_file(str(path))
        loaded.post_processor = tokenizers.processors.Sequence([])  # what it puts around a text, cuts or fills up is
        loaded.no_truncation()
        loaded.no_padding()
        same_ids(encoding, loaded)
    return encoding


def _byte_level_bpe(spec: dict, path: Path) -> tiktoken.Encoding:
    """What a tokenizer.json says, as an encoding, if tiktoken's order of merges gives the merges that it lists."""
    model, added = spec["model"], spec["added_tokens"]
    pattern = _pattern(spec, path)
    letters = byte_letters()
    byte_of = {letter: byte for byte, letter in enumerate(letters)}
    special = {token["content"]: token["id"] for token in added}
    ranks = {
        bytes(byte_of[letter] for letter in text): number
        for text, number in model["vocab"].items()
        if special.get(text) != number
    }
    order = sorted(ranks, key=ranks.get)
    longest = max(map(len, order), default=0)
    _refuse(path, "vocab", longest > LONGEST_TOKEN, f"has a token of {longest:,} bytes")
    numbers = [ranks[token] for token in order]
    first = 0 < sum(number < numbers[0] for number in special.values()) == numbers[0]
    advice = "begin after a special token; train without one, and add it afterwards (docs/huggingface.md)"
    _refuse(path, "ids", numbers != list(range(len(order))), advice if first else "have gaps")
    missing = 256 - sum(len(token) == 1 for token in order)
    advice = "of 256; give the trainer initial_alphabet=ByteLevel.alphabet() (docs/huggingface.md)"
    _refuse(path, "vocab", missing, f"lacks {missing} bytes {advice}")
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    made = [ranks[bytes(byte_of[letter] for letter in left + right)] for left, right in merges]
    _refuse(path, "merges", made != sorted(made), "are not in the order of the ids they make")
    if END_OF_TEXT not in special:
        end = _end_of_text(path.parent)
        advice = f"are without {END_OF_TEXT}, and tokenizer_config.json names no other end of text; add it as a special"
        _refuse(path, "added_tokens", end not in special, f"{advice} token, after training (docs/huggingface.md)")
        special[END_OF_TEXT] = special.pop(end)
    names = {token: "".join(letters[byte] for byte in token) for token in order}
    listed = set(merges)
    for token in order:
        pair = recover_merge(token, ranks)
        unmade = len(pair) > 2 and not model.get("ignore_merges")  # tiktoken takes it where it is a whole piece
        _refuse(path, "merges", unmade, f"do not make {names[token]!r}")
        if len(token) > 1 and len(pair) == 2:
            missing = (names[pair[0]], names[pair[1]]) not in listed
            _refuse(path, "merges", missing, f"do not make {names[token]!r} of {names[pair[0]]!r} and the rest")
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _pattern(spec: dict, path: Path) -> str:
    """How a tokenizer.json cuts text into pieces, if that is one of `KNOWN_PATTERNS`; refuses what else it may do."""
    model = spec["model"]
    _refuse(path, "model", model.get("type") != "BPE", f"is {model.get('type')}")
    _refuse(path, "normalizer", spec.get("normalizer"), f"changes the text: {json.dumps(spec.get('normalizer'))}")
    for part in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _refuse(path, part, model.get(part), f"is {model.get(part)!r}")
    step = spec["pre_tokenizer"]
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    kinds = [part["type"] for part in steps]
    _refuse(path, "pre_tokenizer", steps[-1].get("add_prefix_space"), "adds a space in front")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    _refuse(path, "pre_tokenizer", kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex"), f"is {kinds}")
    pattern = steps[0]["pattern"].get("Regex")
    known = {for_oniguruma(ours): ours for ours in KNOWN_PATTERNS}
    _refuse(path, "pre_tokenizer", pattern not in known, f"cuts by a pattern not known here: {pattern!r}")
    _refuse(path, "pre_tokenizer", steps[0].get("behavior") != "Isolated" or steps[0].get("invert"), "removes text")
    return known[pattern]


def _end_of_text(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    token = read_json(path).get("eos_token") if path.exists() else None
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise DataError(f"{path}: eos_token is {token!r:.80}; name a token")
    return token


def _refuse(path: Path, part: str, condition: object, what: str) -> None:
    if condition:
        raise DataError(f"{path}: {part} {what}; only byte-level BPE with the pattern of GPT-2, GPT-4 or Qwen comes in")
