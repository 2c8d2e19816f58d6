"""Questions and documents made from held-out text, as files that EleutherAI's lm_eval reads too.

held-out documents ┬─ make_questions ─ endings.jsonl ─┬─ score_choices, score_documents (scoring.py)
                   └────────────────── documents.jsonl ┴─ lm_eval, through the .yaml beside each
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from data_utils import TokenData
from machinery.errors import UserError
from machinery.files import make_folder, write_atomic
from machinery.tokenizers import END_OF_TEXT

CONTEXT_CHARACTERS = 400  # of a question, at most; it begins at a line where it can
ENDING_CHARACTERS = (40, 100)  # of an ending, fewest and most; it ends with a word
ENDINGS = 4  # as HellaSwag has
QUESTIONS = 200  # the standard error is then 0.035 at most


# -------------------------------------------------------------------------------------- held-out text


def held_out_documents(data: TokenData, tokens: int | None = None) -> list[str]:
    """The held-out documents, whole and in order: all, or until they have `tokens` tokens (at least one document).

    A document that spells out the end-of-text token is left out: other tokenizers read it as the token.
    """
    texts, left = [], tokens
    for ids in data.documents("val"):
        text = data.encoding.decode_bytes(ids.tolist()).decode("utf-8")
        if text and END_OF_TEXT not in text:
            texts.append(text)
            left = left and left - len(ids)
        if left is not None and left <= 0:
            break
    return texts


# ------------------------------------------------------------------------------------- multiple choice


def make_questions(documents: list[str], block_size: int, count: int = QUESTIONS, seed: int = 0) -> list[dict]:
    """Up to `count` questions in HellaSwag's format: "ctx", "endings", and "label", the place of the true ending.

    A text is cut at a space between two words: what comes before is the context, what follows the true ending,
    and what follows such cuts in other documents (other places, where there is only one) are the wrong ones.
    Endings have less than `block_size` bytes, so that they fit in a context whatever the tokenizer. A function of its
    arguments. Text without spaces gives none.
    """
    random = np.random.default_rng(seed)
    cuts = [(number, *cut) for number, text in enumerate(documents) for cut in _cuts(text, block_size)]
    alone = len({number for number, _, _ in cuts}) == 1
    questions = []
    for number, context, truth in (cuts[i] for i in random.permutation(len(cuts))[:count]):
        drawn = (cuts[i] for i in random.integers(len(cuts), size=64))
        wrong = [ending for other, _, ending in drawn if ending != truth and (alone or other != number)]
        endings, label = list(dict.fromkeys(wrong))[: ENDINGS - 1], int(random.integers(ENDINGS))
        if len(endings) == ENDINGS - 1:
            endings.insert(label, truth)
            questions.append({"ctx": context, "endings": endings, "label": label})
    return questions


def _cuts(text: str, block_size: int) -> Iterator[tuple[str, str]]:
    """(context, ending) at spaces between words, about one in every CONTEXT_CHARACTERS characters."""
    fewest, most = ENDING_CHARACTERS
    most = max(fewest, min(most, block_size - 1))
    reached = CONTEXT_CHARACTERS // 2
    for match in re.finditer(r"(?<=\S) (?=\w)", text):
        cut = match.start()
        if cut >= reached:
            context = text[max(0, cut - CONTEXT_CHARACTERS) : cut]
            if cut > CONTEXT_CHARACTERS and "\n" in context:
                context = context[context.index("\n") + 1 :]
            ending = re.match(rf"[\s\S]{{{fewest},{most}}}(?=\s)", text[cut + 1 : cut + most + 2])
            if ending and context.strip() and len(ending[0].encode()) < block_size:
                yield context, ending[0].rstrip()
                reached = cut + CONTEXT_CHARACTERS


def encode_pair(encoding: tiktoken.Encoding, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both, cut as lm_eval does: encoded as one text, after as many tokens as the context has alone.

    White space at the end of the context counts to the continuation, since most tokens begin with their space.
    Raises `UserError` where a side has no token of its own.
    """
    text, context = context + continuation, context.rstrip()
    before, whole = encoding.encode_ordinary(context), encoding.encode_ordinary(text)
    if not before or len(whole) <= len(before):
        raise UserError(f"context {context[-40:]!r} and ending {continuation[:40]!r}: each needs a token of its own")
    return before, whole[len(before) :]


# ----------------------------------------------------------------------------------------------- files


def write_tasks(folder: str | Path, questions: list[dict], documents: list[str]) -> None:
    """Both tasks as JSON lines, each with the file that describes it to lm_eval. One without lines is left out."""
    folder = Path(folder)
    make_folder(folder)
    tasks = {"endings": questions, "documents": [{"text": text} for text in documents]}
    names = [name for name, rows in tasks.items() if rows]
    for name in names:  # all of these first: one without its lines says that the rest is still to come
        write_atomic(folder / f"{name}.yaml", Path(__file__).with_name(f"{name}.yaml").read_bytes())
    for name in names:
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in tasks[name]))


def has_tasks(folder: Path) -> bool:
    """Whether a folder holds all that `write_tasks` began to write there, and at least one task."""
    lines = {path.stem for path in folder.glob("*.jsonl")}
    return bool(lines) and {path.stem for path in folder.glob("*.yaml")} <= lines


def read_questions(path: str | Path) -> list[dict]:
    """The questions of a file such as `write_tasks` leaves. Raises `UserError` naming the line that is not one."""
    questions = _read_lines(path)
    for number, row in enumerate(questions, 1):
        context, endings, label = (row.get(name) for name in ("ctx", "endings", "label"))
        where = f"{path}, line {number}"
        if not isinstance(context, str) or not context.strip():
            raise UserError(f"{where}: ctx is {str(context)[:40]!r}; it must be a text that is not blank")
        if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
            raise UserError(f"{where}: endings is {str(endings)[:40]!r}; it must be a list of two texts or more")
        if type(label) is not int or not 0 <= label < len(endings):
            raise UserError(f"{where}: label is {label!r} with {len(endings)} endings; it must be the place of one")
    return questions


def read_texts(path: str | Path) -> list[str]:
    """The documents of a file such as `write_tasks` leaves. Raises `UserError` naming the line that is not one."""
    rows = _read_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise UserError(f"{path}, line {number}: text is {str(row.get('text'))[:40]!r}; it must be a text")
    return [row["text"] for row in rows]


def _read_lines(path: str | Path) -> list[dict]:
    """The objects in a JSON-lines file, one at least."""
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as text ({type(error).__name__})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{path}, line {number}: not JSON ({line[:40]!r})") from None
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}, line {number}: holds {type(rows[-1]).__name__}, not an object")
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows
