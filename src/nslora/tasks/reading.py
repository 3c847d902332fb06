"""Read rows of questions and answers from files as people have them, each with its line.

Formats: JSON lines, a JSON array, CSV, TSV, Parquet, and such a file of a data set on the hub.
Columns: question and answer, prompt and completion, instruction, input and output, chat messages,
or any names with a mapping.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nslora.types import UserError

# what a row is made of; a mapping may give each of them another name
FIELDS = ("question", "answer", "rules", "grader")
# names of the question and of the answer, the first that fits
PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("input", "output"),
)
CHATS = ("messages", "conversations")
# names of the speakers in both kinds of chats
SPEAKERS: dict[object, str] = {"human": "user", "gpt": "assistant"}
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # before UTF-16, whose mark is the beginning of its own
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# first bytes of files that are no text
PACKED = {
    b"PK": "a zip or a spreadsheet; save its table as CSV",
    b"\x1f\x8b": "compressed; unpack it first",
}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w.-]+))?")
BLANK = re.compile(r"\s*")

# a row's columns, or why the row cannot be read
Line = tuple[int, object]


@dataclass(frozen=True)
class Table:
    """The rows of a file: (line, counted from 1; the row as it was parsed, or a UserError).

    Attributes:
        kind: what the file is, in words.
        unit: what rows are counted by: "line", or "row" where a format has no lines.
    """

    kind: str
    unit: str
    rows: list[Line]


def fetch(source: str) -> Path:
    """Return the file of a source: a path, or `hub:<owner>/<name>[/<file>][@<revision>]`, fetched.

    Raises UserError for a source that is not there, or whose file is not the only one.
    """
    if not source.startswith("hub:"):
        # False for a name that is too long, too
        if not os.path.isfile(source):
            raise UserError(f"there is no file {source}.")
        # links are kept, since the suffix may be theirs
        return Path(source).absolute()
    match = HUB.fullmatch(source)
    if match is None:
        raise UserError(f"{source!r} must read hub:<owner>/<name>[/<file>][@<revision>].")
    # takes a second to import
    from httpx import HTTPError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, name, revision = match.groups()
    try:
        info = HfApi().dataset_info(repo, revision=revision)
        files = [file.rfilename for file in info.siblings or []]
        name = _only(source, files) if name is None else name
        path = hf_hub_download(repo, name, repo_type="dataset", revision=info.sha)
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot fetch {source}: {reason.rstrip('.')}.") from None
    return Path(path)


def _only(source: str, files: Sequence[str]) -> str:
    """Return the one data file of a data set, or its one training file; raises UserError."""
    tables = [name for name in files if name.endswith(SUFFIXES)]
    train = [name for name in tables if "train" in name]
    for choice in (tables, train):
        if len(choice) == 1:
            return choice[0]
    choices = ", ".join(tables[:8]) or f"none of {', '.join(SUFFIXES)}"
    raise UserError(f"{source} has no single data file; name one after it ({choices}).")


def load(path: Path) -> Table:
    """Read the rows of a file; a row that cannot be read is a UserError in its place.

    Raises UserError for a file that cannot be read at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    for start, remedy in PACKED.items():
        if data.startswith(start):
            raise UserError(f"{path} is {remedy}.")
    if data.startswith(b"PAR1"):
        return Table("Parquet", "row", _parquet(path))
    text, encoding = _decode(data, path)
    # joined files have a mark at every seam
    text = text.replace("\ufeff", "")
    first = text.lstrip()[:1]
    if first == "{" and _is_spread(text):
        raise UserError(f"{path}: an object goes over several lines; put one on each line.")
    if first == "[":
        kind, rows = "a JSON array", _json_array(text)
    elif first == "{" or path.suffix in (".jsonl", ".ndjson", ".json"):
        kind, rows = "JSON lines", _json_lines(text)
    else:
        kind, rows = "a table with a header", _csv(text)
    return Table(f"{kind}, {encoding.upper()}", "line", list(rows))


# ---- formats


def _decode(data: bytes, path: Path) -> tuple[str, str]:
    """Return the text of a file without its byte order mark, and its encoding."""
    unmarked = (b"", _unmarked(data[:4096]))
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), unmarked)
    data = data[len(mark) :]
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        from charset_normalizer import from_bytes

        guess = from_bytes(data).best()
        likely = guess.encoding if guess else "latin-1"
        raise UserError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not {encoding.upper()}; the file "
            f"may be {likely}: save it as UTF-8 (iconv -f {likely} -t UTF-8)."
        ) from None


def _unmarked(start: bytes) -> str:
    """Tell the encoding without a byte order mark: in UTF-16 every second byte is mostly zero."""
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[offset::2].count(0) > len(start) / 4:
            return encoding
    return "utf-8"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the object of these keys and values; raises UserError where a key comes twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice!r} comes twice; leave one out.")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parse(text: str, start: int = 0) -> tuple[object, int]:
    """Return the JSON value at `start`, and where it ends; raises UserError."""
    try:
        return DECODER.raw_decode(text, _skip(text, start))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        where = f"{line}column {error.colno}"
        raise UserError(f"not valid JSON ({error.msg} at {where}).") from None
    # thousands of brackets or digits
    except (ValueError, RecursionError) as error:
        raise UserError(f"not readable as JSON ({error}).") from None


def _skip(text: str, at: int) -> int:
    """Return where the white space ends that begins at `at`."""
    return next(BLANK.finditer(text, at)).end()


def _is_spread(text: str) -> bool:
    """Tell whether a text begins with a JSON object over several lines."""
    try:
        _, end = _parse(text)
    except UserError:
        return False
    return "\n" in text[:end].strip()


def _json_lines(text: str) -> Iterator[Line]:
    # at "\n" only: other separators may stand in strings
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row, end = _parse(raw)
            if raw[end:].strip():
                row = UserError(f"not valid JSON (more after column {end}).")
        except UserError as error:
            row = error
        yield line, row


def _json_array(text: str) -> Iterator[Line]:
    """Yield the elements of an array by the line where each begins; the first error ends it."""
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = _parse(text, at)
        except UserError as error:
            yield line, error
            return
        yield line, row
        at = _skip(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    if text[at:].strip() != "]":
        line += text.count("\n", counted, at)
        yield line, UserError("not valid JSON (a comma or the end of the array is missing).")


def _csv(text: str) -> Iterator[Line]:
    header, _, _ = text.lstrip().partition("\n")
    delimiter = max(",;\t|", key=header.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = (f"{line}\n" for line in text.split("\n"))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        # a row with line breaks in quotes has the line of its beginning
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield line, UserError(f"not valid CSV ({error}); close its quotation marks.")
            return
        if cells is None:
            return
        if not any(cells):
            continue
        if not names:
            names = [cell.strip() for cell in cells]
        elif len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        else:
            yield (
                line,
                UserError(
                    f"{len(cells)} cells where the header has {len(names)}; "
                    f'put texts that hold {delimiter!r} in quotation marks, as in "a{delimiter} b".'
                ),
            )


def _parquet(path: Path) -> list[Line]:
    # takes a quarter of a second to import
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path} as Parquet: {reason.rstrip('.')}.") from None
    return list(enumerate(rows, start=1))


# ---- columns


def mapping(text: str) -> dict[str, str]:
    """Return {their name: our name} of "question=ask,answer=reply"; raises UserError."""
    names = {}
    for pair in filter(None, text.split(",")):
        ours, equals, theirs = pair.partition("=")
        if ours.strip() not in FIELDS or not equals or not theirs.strip():
            raise UserError(
                f"column mapping {pair!r} must be FIELD=COLUMN with FIELD one of {', '.join(FIELDS)}."
            )
        names[theirs.strip()] = ours.strip()
    return names


def fields(row: object, names: Mapping[str, str]) -> tuple[dict[str, object], set[str]]:
    """Return a row's fields (question, answer, and rules and grader where given), and remarks.

    The remarks say what of the row is left out.

    Args:
        names: {their name: our name}; without it, columns are known by their usual names.

    Raises UserError for a row without question and answer.
    """
    if not isinstance(row, dict):
        raise UserError('a row must be an object like {"question": ..., "answer": ...}.')
    columns = {str(name).strip().lower(): value for name, value in row.items()}
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(f"there is no column {missing[0]!r}; the columns are {', '.join(row)}.")
    for theirs, ours in names.items():
        columns.pop(theirs.strip().lower(), None)
        columns[ours] = row[theirs]
    found, used = _pair(columns)
    for name in ("rules", "grader"):
        # a table has a value in every row
        if columns.get(name) not in (None, "") and columns[name] == columns[name]:
            found[name] = columns[name]
    unused = set(columns) - used - {"rules", "grader"}
    remarks = {f"column {name!r} is left out" for name in unused}
    if any(_has_system(columns.get(name)) for name in used):
        remarks.add("system messages are left out")
    return found, remarks


def _pair(columns: Mapping[str, object]) -> tuple[dict[str, object], set[str]]:
    """Return question and answer of a row, and the names of the columns that they are from."""
    for name in CHATS:
        if name in columns and not {"question", "answer"} <= set(columns):
            question, answer = _exchange(columns[name])
            return {"question": question, "answer": answer}, {name}
    for question, answer in PAIRS:
        if question in columns and answer in columns:
            break
    else:
        raise UserError(
            f"no question and answer among its columns ({', '.join(columns)}); "
            "name them with --map question=COLUMN,answer=COLUMN."
        )
    asked, replied, used = columns[question], columns[answer], {question, answer}
    if isinstance(asked, list) and isinstance(replied, list) and question == "prompt":
        asked, replied = _exchange([*asked, *replied])
    if question == "instruction":
        used.add("input")
        if isinstance(asked, str) and columns.get("input"):
            asked = f"{asked}\n\n{columns['input']}"
    return {"question": asked, "answer": replied}, used


def _role(message: dict) -> object:
    role = message.get("role", message.get("from"))
    return SPEAKERS.get(role, role)


def _has_system(value: object) -> bool:
    """Tell whether a column holds a chat with a system message."""
    messages = value if isinstance(value, list) else []
    return any(isinstance(m, dict) and _role(m) == "system" for m in messages)


def _exchange(messages: object) -> tuple[object, object]:
    """Return the one question and its answer of a chat; system messages are left to the prompt."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError('messages must be a list of {"role": ..., "content": ...}.')
    turns = []
    for message in messages:
        role = _role(message)
        if role != "system":
            content = message.get("content", message.get("value"))
            turns.append((role, _joined(content)))
    if [role for role, _ in turns] != ["user", "assistant"]:
        roles = ", ".join(str(role) for role, _ in turns) or "nobody"
        raise UserError(
            f"messages must be one of the user and one of the assistant, not of {roles}; "
            "split a longer chat into rows."
        )
    return turns[0][1], turns[1][1]


def _joined(content: object) -> object:
    """Return the text of a content in parts; any other content as it is."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    if len(parts) < len(content) or not all(isinstance(part, str) for part in parts):
        raise UserError("messages must be of text; pictures and tool calls are not trained on.")
    return "".join(map(str, parts))


def listed(numbers: Iterable[int], unit: str = "line", most: int = 5) -> str:
    """Return "line 3", "lines 3, 5 and 9" or "lines 1, 2, 3, 4, 5 and 12 more"."""
    all_of_them = sorted(set(numbers))
    shown = list(map(str, all_of_them[:most]))
    if len(all_of_them) > most:
        shown.append(f"{len(all_of_them) - most} more")
    if len(shown) == 1:
        return f"{unit} {shown[0]}"
    return f"{unit}s {', '.join(shown[:-1])} and {shown[-1]}"
