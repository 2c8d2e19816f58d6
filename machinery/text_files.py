"""Files of text and tables, read in bounded memory; what is wrong with one is a line that says where.

Of a row of JSON lines or Parquet, the column with the text is read and no other is looked at.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import mmap
import os
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from machinery.errors import DataError, first_line


@contextlib.contextmanager
def telling_os_errors(path: Path) -> Iterator[None]:
    """An error of the operating system as a `DataError` with the path: it is no fault of the text."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # some libraries raise it about content
            raise
        where = error.filename or path
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{where}: is gone or was moved since the source was listed; run this again") from None
        raise DataError(f"{where}: cannot be read ({error.strerror}); check its permissions and the disk") from None


def file_digest(path: Path, samples: bool = False) -> str:
    """sha256 of a file's content, or of its size and up to 64 samples of 64 kB, spread evenly, the ends among them."""
    with telling_os_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not samples or size <= 64 << 16:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(size.to_bytes(8, "big"))
        for number in range(64):
            file.seek((size - (1 << 16)) * number // 63)
            found.update(file.read(1 << 16))
    return found.hexdigest()


MAX_DOCUMENT_BYTES = 16 << 20  # a longer text is read as several documents, cut at line ends where there are any
MAX_LINE_BYTES = 1 << 20  # how much further a line end is looked for
MAX_ROW_BYTES = 256 << 20  # of a row of JSON lines, which is read as a whole
ROWS_BYTES = 8 << 20  # of a Parquet column, read at a time
LARGE_ROWS = 32 << 20  # of those that hold a long text, after which its group is opened anew

FORMATS = {  # first bytes, what they are of, and how to get at the text
    b"\x1f\x8b": ("gzip", "unpack it with gunzip"),
    b"\x1f\x9d": ("compress", "unpack it with uncompress"),
    b"BZh": ("bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("xz", "unpack it with unxz"),
    b"\x5d\0\0": ("lzma", "unpack it with unlzma"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it with unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unpack it with unlz4"),
    **dict.fromkeys((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), ("zlib", "unpack it with pigz -dz")),
    b"LZIP": ("lzip", "unpack it with lzip -d"),
    b"\x89LZO": ("lzop", "unpack it with lzop -d"),
    b"\xff\x06\0\0sNaPpY": ("snappy", "unpack it with snzip -d"),
    b"Salted__": ("a file that OpenSSL has encrypted", "decrypt it"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "unpack it with 7z x"),
    b"Rar!": ("RAR", "unpack it with unrar x"),
    b"PK\x03\x04": ("zip (or a .docx, .xlsx, .epub)", "unpack it or export its text"),
    b"PK\x05\x06": ("an empty zip", "remove it"),
    b"%PDF-": ("PDF", "export its text, for example with pdftotext"),
    b"{\\rtf": ("RTF", "export its text"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "export its text"),
    b"version https://git-lfs": ("a pointer of Git LFS and not the file itself", "fetch it with git lfs pull"),
    b"/annex/objects/": ("a pointer of git-annex and not the file itself", "fetch it with git annex get"),
    b"PAR1": ("Parquet", "give it the suffix .parquet"),
    b"ARROW1": ("Arrow", "convert it to Parquet"),
    b"\xff\xff\xff\xff": ("Arrow", "convert it to Parquet, with datasets.load_from_disk(…).to_parquet(…)"),
    b"Obj\x01": ("Avro", "convert it to Parquet"),
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), ("a Python pickle", "export its text")),
    b"\x93NUMPY": ("a NumPy array", "export its text"),
    b"\x89HDF": ("HDF5", "export its text"),
    b"\x89PNG": ("PNG", "remove it"),
    b"\xff\xd8\xff": ("JPEG", "remove it"),
    b"GIF8": ("GIF", "remove it"),
    b"SQLite format 3\0": ("SQLite", "export its text"),
    b"\x7fELF": ("a program", "remove it"),
    codecs.BOM_UTF32_LE: ("UTF-32", "convert it, for example with iconv -f utf-32 -t utf-8"),
    codecs.BOM_UTF32_BE: ("UTF-32", "convert it, for example with iconv -f utf-32 -t utf-8"),
    codecs.BOM_UTF16_LE: ("UTF-16", "convert it, for example with iconv -f utf-16 -t utf-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "convert it, for example with iconv -f utf-16 -t utf-8"),
}
TEXT_FORMATS = {b"%PDF-", b"{\\rtf", b"version https://git-lfs", b"/annex/objects/"}  # which may be plain characters
SHORT = 64  # bytes of a text that is too short to tell its encoding
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
BETWEEN_WORDS = set(" \n、。，！？「　")  # one of which any longer text holds, where its encoding is not mistaken
CONTROLS = bytes(byte for byte in range(32) if byte not in b"\b\t\n\v\f\r\x1b")  # which text does not hold
FEW_CONTROLS = 0.1  # share of them, beyond which a file is no text; a fifth of it where the file is not UTF-8
HALF = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")  # of a surrogate pair, as if it were a character in UTF-8
SAYS_ENCODING = re.compile(rb"(?i)(?:coding|charset)\s*[=:]\s*[\"']?([\w-]+)")  # as XML, mails, .po files and Python do
SEVEN_BITS = re.compile(rb"\x1b\$(?:\)([ACG])|[@AB()])")
NO_TEXT = re.compile(rb"[%b](?:[^%b]?[%b]){15}" % ((re.escape(CONTROLS),) * 3))  # as binary data has it, or UTF-16


def _check_format(path: Path, head: bytes, expected: str = "UTF-8 text") -> None:
    """Raise `DataError`, naming the format, where the first bytes of a file are of something else."""
    start = _start(head)
    mark, (name, advice) = next((known for known in FORMATS.items() if start.startswith(known[0])), (b"", (None, None)))
    if name and mark not in TEXT_FORMATS and _is_plain(head):  # "Rar! Rar! said the lion."
        name = None
    if expected != "UTF-8 text":
        name = None if name == expected else name
    elif head[257:262] == b"ustar" and not _is_plain(head):
        name, advice = "tar", "unpack it with tar xf"
    elif name is None:
        found, beyond_ascii = _controls(head), len(head) - len(head.translate(None, bytes(range(128, 256))))
        is_utf8 = head.decode(errors="replace").count("\ufffd") <= 1 + beyond_ascii // 10  # but for a few wrong bytes
        many = found > max(is_utf8, len(head) * FEW_CONTROLS / (1 if is_utf8 else 5))
        maybe_wide = not is_utf8 or (beyond_ascii < len(head) / 10 and (many or b"\0" in head))
        if maybe_wide and (wide := _wide_encoding(head)):
            name, advice = wide.upper(), f"convert it, for example with iconv -f {wide} -t utf-8"
        elif seven_bits := _of_seven_bits(head):
            name, advice = "ISO-2022", seven_bits
        elif many and len(head) >= SHORT:
            name = f"binary data ({found} control characters in its first {len(head)} bytes)"
            advice = r"remove it, or put line ends for the NULs with tr '\0' '\n'"
    if name:
        raise DataError(f"{path}: holds {name}, not {expected}; {advice}")


def _of_seven_bits(content: bytes) -> str | None:
    """How to convert Japanese, Korean or Chinese in ISO-2022; None for other content."""
    found = SEVEN_BITS.search(content) if b"\x1b$" in content and content.isascii() else None
    country = found and {b"C": "kr", b"A": "cn", b"G": "cn"}.get(found[1], "jp")
    return f"convert it, for example with iconv -f iso-2022-{country} -t utf-8" if found else None


def _is_plain(head: bytes) -> bool:
    """Whether this is UTF-8 without control characters, but for a character that is cut at the end."""
    with contextlib.suppress(UnicodeDecodeError):
        return bool(codecs.getincrementaldecoder("utf-8")().decode(head)) and not _controls(head)
    return False


def _controls(content: bytes) -> int:
    return len(content) - len(content.translate(None, CONTROLS))


def _wide_encoding(head: bytes) -> str | None:
    """The encoding of text whose characters take two or four bytes each, without a mark; None for other content.

    What stands between words has a byte in such encodings that other text seldom has, such as 0, 1 or 2; of a few
    words, other text is mostly ASCII. In the wrong order of bytes, text has more different high bytes, which name the
    script.
    """
    if len(head) < (2 if _controls(head) else SHORT):
        return None
    ascii_share = sum(32 <= byte < 127 for byte in head) / len(head)
    if ascii_share > 0.7 and sum(byte in b" \n" for byte in head) > 0.05 * len(head):  # words, with an odd byte or two
        return None
    words = head.replace(b"\0", b"")  # where NULs stand between them; of UTF-16, those of English and of Hindi look so
    is_plain = _is_plain(words) and sum(byte < 32 for byte in words) < len(words) / 4
    high = {encoding: head[position::2] for encoding, position in zip(WIDE[2:], (1, 0))}
    for encoding in (*WIDE[:2], *sorted(high, key=lambda name: (len(set(high[name])), sum(high[name])))):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(head)
            no_text = sum(c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in text)
            is_ascii = sum(map(str.isascii, text)) > len(text) / 2
            is_text = encoding in WIDE[:2] or is_ascii or not (is_plain or BETWEEN_WORDS.isdisjoint(text))
            is_likely = is_text if is_plain or len(text) >= 32 else ascii_share < 0.7
            if text and no_text <= 0.05 * len(text) and is_likely:
                return encoding
    return None


def separator_pattern(split_on: str) -> re.Pattern | None:
    """What is looked for between documents: line ends in it stand for those of any system, and the outermost
    also for the start and the end of a text. None for nothing.
    """
    lines = re.sub(r"\r\n?", "\n", split_on)
    body = lines.strip("\n")
    end, start, stop = (rf"(?:\r\n?+|\n{edge})" for edge in ("", r"|\A", r"|\Z"))  # "\r\n" is one, never two
    if not body:
        return re.compile(end * len(lines)) if lines else None
    first, last = len(lines) - len(lines.lstrip("\n")), len(lines) - len(lines.rstrip("\n"))
    again = end.join(map(re.escape, body.split("\n"))) + (end * (last - 1) + stop if last else "")
    once = (start + end * (first - 1) if first else "") + again
    if first and last:  # of several that follow one another, each may begin with line ends of the one before
        once += f"(?:{end}{{{max(0, first - last)},{first}}}{again})*"
    return re.compile(once)


def texts(path: Path, separator: re.Pattern | None) -> Iterator[str]:
    """The text of a file; in several parts where it is long, cut at a separator or a line end."""

    def blocks() -> Iterator[bytes]:
        for block in _blocks(file):
            yield block  # which is decoded before it is looked at
            if advice := _of_seven_bits(block):
                raise DataError(f"{path}: holds ISO-2022, not UTF-8 text; {advice}")
            if found := _controls(block) >= 16 and NO_TEXT.search(block):  # counting is six times as fast
                raise _no_text(path, file.tell() - len(block) + found.start())

    is_utf8 = False
    with path.open("rb", 1 << 16) as file:
        _check_format(path, head := file.peek(4096)[:4096])
        try:
            for part in _decoded(blocks(), separator):
                is_utf8 = is_utf8 or not part.isascii()
                yield part
        except UnicodeDecodeError as error:
            before, found = file.tell() - len(error.object), NO_TEXT.search(error.object)
            at, after = before + error.start, error.object[error.start :][:4096]
            if found and found.start() <= error.start + len(codecs.BOM_UTF16):
                raise _no_text(path, min(at, before + found.start())) from None
            if len(after) >= SHORT and _controls(after) > len(after) * FEW_CONTROLS / 5:
                raise _no_text(path, at) from None
            advice = _mend_or_convert(error.object, is_utf8, head)
            if file.tell() < SHORT and file.tell() % 2 == 0:
                advice += "; or it is UTF-16, in so few bytes hard to tell: iconv -f utf-16-le -t utf-8"
            raise DataError(f"{path}: not UTF-8 at byte {at} (0x{error.object[error.start]:02x}); {advice}") from None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The content of a file in blocks, cut at line ends where there are any."""
    while block := file.read(MAX_DOCUMENT_BYTES):
        block += file.readline(MAX_LINE_BYTES) if len(block) == MAX_DOCUMENT_BYTES else b""
        if block.endswith(b"\r") and (more := file.read(1)):  # a line end is not cut
            if more == b"\n":
                block += more
            else:
                file.seek(-1, os.SEEK_CUR)
        yield block


def _decoded(blocks: Iterable[bytes], separator: re.Pattern | None) -> Iterator[str]:
    """A text in parts that follow its blocks; with a separator, cut there where it can be. The last may be empty."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    for block in blocks:
        rest += decoder.decode(block)
        del block
        cut = len(rest)
        if separator:  # what comes after the last one may go on
            cut -= len(separator.pattern)  # where one begins, it may end in the next block
            found = 0
            for match in separator.finditer(rest):  # each part begins with a line or with a separator
                if match.end() <= cut:
                    found = match.end() if rest[match.end() - 1] in "\r\n" else match.start()
            cut = rest.rfind("\n", cut - MAX_LINE_BYTES, cut) + 1 or cut
            cut = cut if cut - found > 3 * MAX_DOCUMENT_BYTES else found
        yield rest[:cut]
        rest = rest[cut:]
    yield rest + decoder.decode(b"", final=True)


def _mend_or_convert(content: bytes, is_utf8: bool = False, head: bytes = b"") -> str:
    """What to do with content that is not all UTF-8, and with `is_utf8` comes after some that is. The `head` of a file
    may name its encoding.
    """
    # In other encodings, few bytes happen to be UTF-8; Java and Oracle write halves of characters so
    text = HALF.sub("\u20ac".encode(), content).decode(errors="replace")
    wrong, beyond_ascii = text.count("\ufffd"), len(text) - len(text.encode("ascii", "ignore"))
    if is_utf8 or beyond_ascii > 2 * wrong:
        return "before that it is; mend these bytes, or leave such out with iconv -c -f utf-8 -t utf-8"
    for name in (said.decode() for said in SAYS_ENCODING.findall(head)):
        with contextlib.suppress(LookupError, UnicodeError):  # of what is none for text, as base64 in mails
            if "a".encode(name) and not codecs.lookup(name).name.startswith("utf"):
                return f"convert it from the encoding that it names, with iconv -f {name} -t utf-8"
    return (
        "convert it from the encoding that it is in, for example with iconv -f cp1252 -t utf-8, or cp1251 for Russian,"
        " gb18030 for Chinese, shift_jis for Japanese"
    )


def _no_text(path: Path, at: int) -> DataError:
    return DataError(f"{path}: holds binary data or UTF-16 from byte {at} on; cut or convert it there")


DECODER = json.JSONDecoder(parse_int=float)  # numbers are never text; of int, only so many digits are read


LONG_ROW = 1 << 20  # bytes, from which on a row's other columns and a single emoji would take several times as many
OBJECT = re.compile(rb"[ \t\r]*\{")  # how a row begins; at another, null, Arrow's reader breaks down
ROW = "a row is one object on one line"
NO_ROW = b"\x1e\x1a"  # stands before each row in JSON text sequences (RFC 7464), and at the end of old files (Ctrl-Z)


def json_text(line: str | bytes, text_column: str, where: str, is_utf8: bool = False) -> str:
    """The text of one row of JSON lines; "" for null. No other column is looked at. Raises `DataError`.

    With `is_utf8`, rows before it hold more than ASCII.
    """
    return row_text(_decode_json(line, text_column, where, f"{ROW}, as from jq -c .", is_utf8), text_column, where)


def holds_rows(text: str, text_column: str) -> bool:
    """Whether a text begins with rows of JSON lines, the first of which has this column."""
    line, _, rest = text.lstrip("\ufeff \r\n\t").partition("\n")
    with contextlib.suppress(ValueError, RecursionError):
        return line[:1] == "{" and text_column in DECODER.decode(line) and rest.lstrip()[:1] in ("", "{")
    return False


def array_texts(content: str, text_column: str, where: str) -> list[str]:
    """The texts of the rows of a JSON array, which has to be read as a whole."""
    rows = _decode_json(content.removeprefix("\ufeff"), text_column, where, "a file is one array of objects")
    return [row_text(row, text_column, f"{where}, row {number}") for number, row in enumerate(rows, 1)]


def _decode_json(content: str | bytes, text_column: str, where: str, expected: str, is_utf8: bool = False) -> object:
    try:
        return DECODER.decode(content) if isinstance(content, str) else _decode_row(content, text_column)
    except UnicodeDecodeError as error:
        line = f"{where}: not UTF-8 at byte {error.start} of the line"
        raise DataError(f"{line}; {_mend_or_convert(error.object, is_utf8)}") from None
    except json.JSONDecodeError as error:
        found = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        if error.doc[: error.pos].endswith("\r"):
            expected = r"its lines end in carriage returns alone; make them line ends with tr '\r' '\n'"
        raise DataError(f"{where}: not JSON ({found}); mend it: {expected}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply; mend or remove it") from None


def _decode_row(line: bytes, text_column: str) -> object:
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):  # the text itself may be right
            row = DECODER.decode(line.decode("utf-8", "surrogateescape"))
            if isinstance(text := row.get(text_column), str):
                text.encode()
            return row
        raise


def _long_text(line: bytes, text_column: str) -> bytes | None:
    """The text of a row, of which nothing else is made; None where it has none, or is not as it should be."""
    from pyarrow import BufferReader, default_memory_pool, json, schema, string

    reading = json.ReadOptions(use_threads=False, block_size=len(line) + 1)
    parsing = json.ParseOptions(schema([(text_column, string())]), unexpected_field_behavior="ignore")
    content = None
    with contextlib.suppress(ValueError):  # told by who reads all of the row
        column = json.read_json(BufferReader(line), reading, parsing)[text_column]
        column.validate(full=True)  # that it is UTF-8
        (text,) = column
        content = text.as_buffer().to_pybytes() if text.is_valid else None
        del column, text
    default_memory_pool().release_unused()
    return content


def in_parts(text: str, size: int) -> Iterator[str]:
    """A text in parts of at most `size` characters, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start + size // 2, end) + 1 or end
        yield text[start:end]
        start = end


def row_text(row: object, text_column: str, where: str) -> str:
    """The text of a row; "" for null. Raises `DataError` for anything else."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {_type_of(row)}, not an object; mend or remove it")
    if text_column not in row:
        raise no_column(where, text_column, row)
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column {text_column!r} holds {_type_of(text)}, not text; name another in text_column, or join it"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: column {text_column!r} holds half of a surrogate pair at character {error.start + 1}, which"
                " is not text; mend it"
            ) from None
    return text


def _type_of(value: object) -> str:
    names = {int: "a number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def no_column(where: str, text_column: str, names: Iterable[str]) -> DataError:
    names = [_spelt(name) for name in names]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    missing = f"{where}: no column {_spelt(text_column)}; there are {shown or 'none'}"
    return DataError(
        f"{missing}: set text_column to one that every row has, also those of val_source, null where it has no text,"
        " or rename it"
    )


def _spelt(name: str) -> str:
    """A name as Python writes it, so that two that differ in their code points alone look different."""
    return repr(name) if unicodedata.is_normalized("NFC", name) else ascii(name)


def _without_marks(line: bytes) -> bytes:
    while line.startswith(codecs.BOM_UTF8):
        line = line[len(codecs.BOM_UTF8) :]
    return line


def _start(head: bytes) -> bytes:
    """The first bytes of a file that are neither marks nor blanks."""
    return _without_marks(head.lstrip()).lstrip()


def jsonl_texts(path: Path, text_column: str, separator: re.Pattern | None = None) -> Iterator[str]:
    """The text of every row of a JSON-lines file, in parts as that of a file. Raises `DataError` naming the line."""
    with path.open("rb") as file:
        _check_format(path, head := file.read(4096))
        if (start := _start(head)).startswith(b"["):  # all of it may be one line
            number = 1 + head.count(b"\n", 0, len(head) - len(start))
            raise DataError(f"{path}, line {number}: holds a list, not an object; {ROW}, as from jq -c '.[]'")
        file.seek(0)
        name, number, is_utf8 = str(path), 0, False  # the name once, for there may be millions of rows
        while line := file.readline(MAX_ROW_BYTES):
            number += 1
            if len(line) == MAX_ROW_BYTES:  # such as the zero bytes of a download that has not finished
                raise DataError(f"{name}, line {number}: has {len(line):,} bytes or more; {ROW}; mend or remove it")
            if line[0] == 0xEF:  # each of several files that were put together may have a mark
                line = _without_marks(line) or b"\n"
            if line[0] in NO_ROW or line[-1] in NO_ROW:
                line = line.strip(NO_ROW) or b"\n"
            if line.isspace():
                continue
            content = _long_text(line, text_column) if len(line) > LONG_ROW and OBJECT.match(line) else None
            text = "" if content is not None else json_text(line, text_column, f"{name}, line {number}", is_utf8)
            is_utf8 = is_utf8 or not line.isascii()
            del line  # a row may be large
            if content is not None:
                yield from _text_of_row(io.BytesIO(content), separator)
            else:
                yield text


def _text_of_row(content: io.BytesIO, separator: re.Pattern | None) -> Iterator[str]:
    """The text of a row, "" too; a long one in parts, as that of a file."""
    if content.getbuffer().nbytes > LONG_ROW:
        yield from filter(None, _decoded(_blocks(content), separator))
    else:
        yield content.read().decode()


def parquet_texts(path: Path, text_column: str, separator: re.Pattern | None = None) -> Iterator[str]:
    """The text of every row of a Parquet file; of its other columns, nothing is read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as content:
            _check_format(path, content.read(4096), "Parquet")
        options = {"buffer_size": 1 << 20, "page_checksum_verification": True}
        with path.open("rb") as content, ParquetFile(content, **options) as file:
            if file.metadata.num_rows:
                _check_column(file.schema_arrow, text_column, path)
                yield from _parquet_column(file, text_column, path, separator)
                _check_alone(path, file.metadata, text_column)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: not readable as parquet ({first_line(error)}); mend or remove it") from None


def _check_column(schema, text_column: str, path: Path) -> None:
    from pyarrow import BaseExtensionType, types

    if schema.names.count(text_column) > 1:
        raise DataError(f"{path}: two columns are called {text_column!r}; rename one")
    if text_column not in schema.names:
        raise no_column(str(path), text_column, schema.names)
    kind = schema.field(text_column).type
    kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind  # such as text that is JSON
    kind = kind.value_type if types.is_dictionary(kind) else kind
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    if not text:
        raise DataError(
            f"{path}: column {text_column!r} holds {kind}, not text; name another in text_column, or convert it"
        )


def _check_alone(path: Path, metadata, text_column: str) -> None:
    """Raise `DataError` where several files were put together: the last says what is read, at places of the first.

    For when the column has been read: of one that cannot be, such as an encrypted one, Arrow breaks down here.
    """
    number = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == text_column)
    column = metadata.row_group(metadata.num_row_groups - 1).column(number)
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if (found := content.find(b"PAR1PAR1", end)) >= 0:
            raise DataError(
                f"{path}: another Parquet file begins at byte {found + 4:,}; give each as a file of its own"
            )


def _parquet_column(file, text_column: str, path: Path, separator: re.Pattern | None) -> Iterator[str]:
    from pyarrow import default_memory_pool, large_binary

    first = 1  # rows are counted from 1, as lines are
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        size = max(rows, file.metadata.row_group(group).total_byte_size)
        # A file holds a text once that many rows repeat; in memory each row has its own copy
        at_once = max(1, min(1 << 10, ROWS_BYTES * rows // max(1, size)))
        options = {"row_groups": [group], "columns": [text_column], "use_threads": False}
        batches, read, end = None, 0, first + rows
        while first < end:
            batches = batches or islice(file.iter_batches(at_once, **options), read, None)
            if (batch := next(batches, None)) is None:
                break
            column = batch.column(text_column).cast(large_binary())  # "a.b" also names a field of a column
            texts, large = deque(column.to_pylist()), column.nbytes > LARGE_ROWS
            rows, read = len(texts), read + 1
            del batch, column
            if large or first + rows == end:  # the reader holds them three times over; for what follows, another one
                batches = None
            if large:  # else Arrow keeps what it has freed
                default_memory_pool().release_unused()
            for number in range(rows):
                content = io.BytesIO(texts.popleft())
                try:
                    yield from _text_of_row(content, separator)
                except UnicodeDecodeError as error:
                    at = content.tell() - len(error.object) + error.start
                    raise DataError(
                        f"{path}, row {first + number}: not UTF-8 at byte {at} of column {text_column!r}; mend it"
                    ) from None
            first += rows
    if first - 1 != file.metadata.num_rows:
        raise DataError(f"{path}: {first - 1:,} of its {file.metadata.num_rows:,} rows can be read; mend or remove it")
