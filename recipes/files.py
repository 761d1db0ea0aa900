"""Files to documents: which files a path names, what is in them, and what of them is not read.

The suffix says what a file is, in any case: JSON lines (.jsonl, .ndjson, .json), Parquet (.parquet) or, whatever else
it ends in, text, a file a document. Each may be compressed: .gz, .bz2, .xz, .zst.

Nothing is passed over without a word. A file that holds no text, since it is binary or in another encoding, is counted
with its reason and the first one is named; a damaged file is an error. Files are read, never executed or unpickled.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock
from tqdm import tqdm

from configs.errors import first_line
from recipes.atomic import new_folder

Kind: TypeAlias = Literal["text", "json", "parquet"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FORMAT = 3  # of the cached Arrow files: what an older program has read must not be taken for what this one reads
BATCH_BYTES = 16 << 20  # of text that are held at once
CHUNK_BYTES = 1 << 20  # of a compressed file that are read at once
DOCUMENT_BYTES = 15 << 27  # 1.875 GiB; Arrow's strings of a batch have less than 2 GiB together
# A byte order mark says which encoding it is; UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# What reading a damaged file raises, whatever compresses it.
DAMAGES = (OSError, ValueError, EOFError, RecursionError, lzma.LZMAError, zlib.error, pa.ArrowException)


class UnreadableError(Exception):
    """A file that holds no text; the message is the reason."""


class DamagedError(Exception):
    """A file that breaks off, or is not what its suffix says; the message names it."""


class ColumnError(Exception):
    """The column that holds the text is missing, or holds something else."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@dataclass
class Report:
    """What was read and what was not."""

    files: Counter[str] = field(default_factory=Counter)
    """By kind."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    """Of the documents, in UTF-8."""

    file_bytes: int = 0
    """Of the files that were read."""

    left_out: dict[str, list[Any]] = field(default_factory=dict)
    """Reason to how many files, and the name of the first."""

    notes: dict[str, list[Any]] = field(default_factory=dict)
    """What was read otherwise than one might think: to how many files, and the name of the first."""

    def leave_out(self, reason: str, file: str) -> None:
        self.left_out.setdefault(reason, [0, printable(file)])[0] += 1

    def note(self, what: str, file: str) -> None:
        self.notes.setdefault(what, [0, printable(file)])[0] += 1

    def lines(self) -> list[str]:
        """A line on what was read, and one for each reason why something was not."""
        names = {"text": "text", "json": "JSON lines", "parquet": "Parquet", "tokens": "tokens"}
        read = [
            f"{names[kind]}: {count:,} files, {self.documents[kind]:,} documents, {self.bytes[kind] / 1e6:,.1f} MB"
            for kind, count in sorted(self.files.items())
        ]
        out = ["; ".join(read) or "no file was read"]
        out += [f"not read: {count:,} files, {reason}; first {name}" for reason, (count, name) in self.left_out.items()]
        return out + [f"{count:,} files {what}; first {name}" for what, (count, name) in self.notes.items()]


def printable(path: str) -> str:
    """A path for a message: names may hold line breaks, and bytes that are no UTF-8."""
    shown = json.dumps(os.fsencode(path).decode("utf-8", "backslashreplace"), ensure_ascii=False)[1:-1]
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def suffix_of(file: str) -> str:
    """A file's suffix without that of its compression, in lower case."""
    root, suffix = os.path.splitext(file.lower())
    return os.path.splitext(root)[1] if suffix in COMPRESSED else suffix


def kind_of(file: str) -> Kind:
    """What a file is by its suffix."""
    suffix = suffix_of(file)
    return "json" if suffix in JSON_SUFFIXES else "parquet" if suffix == ".parquet" else "text"


def find_files(path: str, report: Report) -> tuple[str, list[str]]:
    """The regular files that a path names and the folder that their names are relative to.

    A folder is searched through, and links in it are followed, each folder once; hidden files and folders are passed
    over, as a glob does.

    Args:
        path: a file, a folder or a glob.
        report: is told of links that lead nowhere, devices, pipes and sockets.

    Returns:
        The folder, and the files sorted by their paths. None where nothing matches.

    Raises:
        OSError: a folder cannot be read.
    """
    if os.path.isdir(path):
        found = [os.path.join(folder, name) for folder, names in _walk(path) for name in names]
        root = path
    elif os.path.lexists(path):
        found, root = [path], os.path.dirname(path) or "."
    else:
        base, deep, rest = path.partition("**/")
        if deep and not glob.has_magic(base) and "**" not in rest:
            folders = _walk(base or ".") if os.path.isdir(base or ".") else ()
            patterns = [os.path.join(glob.escape(folder), rest) for folder, _ in folders]
        else:
            patterns = [path]
        found = [os.path.normpath(file) if not base and deep else file for each in patterns for file in glob.glob(each)]
        found = [file for file in found if not os.path.isdir(file)]
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in found]) if found else ""
    files, seen = [], set()
    for file in sorted(found):
        try:
            status = os.stat(file)
        except OSError:
            report.leave_out("links that lead nowhere", file)
            continue
        if not stat.S_ISREG(status.st_mode):
            report.leave_out("no regular files", file)
        elif (status.st_dev, status.st_ino) not in seen:  # of several links to a file the first is read
            seen.add((status.st_dev, status.st_ino))
            files.append(file)
    return root, files


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files' names, each folder once whatever links lead to it."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, [name for name in names if not name.startswith(".")]


def _open(file: str) -> Any:
    """A binary stream of what a file holds, decompressed."""
    suffix = os.path.splitext(file.lower())[1]
    if suffix in COMPRESSED and not os.path.getsize(file):  # which gzip and pyarrow take for an empty text
        raise EOFError("an empty file, which no compression writes")
    if suffix == ".gz":
        return gzip.open(file)
    # Python's lzma and bz2 take a stream of several that is damaged where it begins for the end of the file.
    if suffix == ".xz":
        return io.BufferedReader(_Xz(file), CHUNK_BYTES)
    if suffix in (".bz2", ".zst"):
        return pa.input_stream(file, compression="bz2" if suffix == ".bz2" else "zstd")
    return open(file, "rb")


class _Xz(io.RawIOBase):
    """What an .xz file holds, in all of its streams and the zeros between them."""

    def __init__(self, file: str) -> None:
        self._file = open(file, "rb")  # noqa: SIM115, closed with this
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed and (more := self._file.read(CHUNK_BYTES)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return 0
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self._stream.needs_input and not (packed := self._file.read(CHUNK_BYTES)):
                raise EOFError("the file ends before its last stream does")
            if chunk := self._stream.decompress(packed, len(buffer)):
                buffer[: len(chunk)] = chunk
                return len(chunk)


def read_text(file: str) -> str:
    """The text of a file as it is, line ends included; a byte order mark is no part of it.

    Raises:
        UnreadableError: the file is binary or in an encoding that it does not name.
        OSError: it cannot be read. Broken compression raises others of `DAMAGES` as well.
    """
    with _open(file) as stream:
        return _decode(stream.read())


def _decode(content: bytes) -> str:
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise UnreadableError("binary") from None
        raise UnreadableError(f"neither UTF-8 nor marked as UTF-16 (such as byte {content[error.start]:#x})") from None
    # Control characters are legal, but a zero is the mark of a binary file.
    if "\0" in text:
        raise UnreadableError("binary")
    return text


def _records(file: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSON-lines file, or of a file that holds one array, with the numbers of their lines."""
    with _open(file) as stream:
        first = stream.read(4)
    encoding = next((name for mark, name in MARKS if first.startswith(mark)), "utf-8")
    with _open(file) as binary:
        # A line ends at a line feed alone: JSON may hold a carriage return or U+2028 as they are.
        lines = io.TextIOWrapper(io.BufferedReader(_Raw(binary)), encoding, newline="\n")
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith("["):
                values = json.loads(line + lines.read())
                yield from ((number, value) for value in (values if isinstance(values, list) else [values]))
                return
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None


class _Raw(io.RawIOBase):
    """Any stream as what Python's own buffers read from; pyarrow's streams lack some methods."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self.stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _read_json(file: str, column: str) -> Iterator[str]:
    columns: set[str] = set()
    for number, value in _records(file):
        if not isinstance(value, dict):
            raise ValueError(f"line {number} holds no object")
        columns |= value.keys()
        text = value.get(column)
        if text is not None and not isinstance(text, str):
            problem = f"the column does not hold text but {json.dumps(text)[:40]} (line {number} of {printable(file)})"
            raise ColumnError(problem, "choose a column of strings")
        yield text or ""
    if columns and column not in columns:
        there = f"the columns are: {', '.join(sorted(columns))} (of {printable(file)})"
        raise ColumnError("no such column", there)


def _read_parquet(file: str, column: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(file) as table:
        schema = table.schema_arrow
        if column not in schema.names:
            there = f"the columns are: {', '.join(sorted(schema.names))} (of {printable(file)})"
            raise ColumnError("no such column", there)
        kind = schema.field(column).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(check(plain) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
            problem = f"the column does not hold text but {kind} (in {printable(file)})"
            raise ColumnError(problem, "choose a column of strings")
        for batch in table.iter_batches(1000, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _read(file: str, kind: Kind, column: str) -> Iterator[str]:
    if kind == "json":
        yield from _read_json(file, column)
    elif kind == "parquet":
        yield from _read_parquet(file, column)
    else:
        yield read_text(file)


def _has_records(file: str, column: str) -> bool:
    """Whether a file that ends in .json begins with an object that has the column: many hold something else."""
    try:
        _, value = next(_records(file), (0, None))
        return isinstance(value, dict) and isinstance(value.get(column), str | None) and column in value
    except (ValueError, RecursionError):
        return False


def choose_kinds(files: list[str], asked: str, column: str, report: Report) -> list[tuple[str, Kind]]:
    """What each file is to be read as.

    Args:
        files: their paths.
        asked: a kind for all of them; or "auto", by suffix.
        column: of JSON and Parquet.
        report: is told of files that are read as something else than their suffix says.
    """
    chosen: list[tuple[str, Kind]] = []
    for file in files:
        kind: Kind = kind_of(file) if asked == "auto" else asked  # type: ignore[assignment]
        if asked == "auto" and suffix_of(file) == ".json" and not _has_records(file, column):
            kind = "text"
            report.note(f'that end in .json and hold no objects with a column "{column}" were read as text', file)
        elif asked == "text" and suffix_of(file) in (".jsonl", ".ndjson"):
            report.note('of JSON lines were read as they stand, since type = "text"; "auto" reads their column', file)
        chosen.append((file, kind))
    return chosen


def load_documents(files: list[tuple[str, Kind]], column: str, report: Report) -> datasets.Dataset:
    """The documents of files, in their order, as a memory-mapped data set with the column `text`.

    They are kept in the cache of the library `datasets`, under a name that files of other sizes or times do not get.

    Args:
        files: paths and what they are read as.
        column: that holds the text in JSON and Parquet files.
        report: is told what was read and what was not.

    Raises:
        ColumnError: a file lacks the column, or it holds no text.
        DamagedError: a file cannot be read to its end.
        OSError: the cache cannot be written.
    """
    stats = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns, kind) for file, kind in files]
    digest = hashlib.blake2b(repr((FORMAT, stats, column)).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "sparsetitan" / digest
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():  # another rank may have written it while this one waited
                _write_cache(files, column, folder)
    found = json.loads((folder / "report.json").read_text())
    for name in ("files", "documents", "bytes"):
        getattr(report, name).update(found[name])
    report.file_bytes += found["file_bytes"]
    report.left_out |= found["left_out"]
    report.notes |= found["notes"]
    return datasets.Dataset.from_file(str(folder / "documents.arrow"))


def _write_cache(files: list[tuple[str, Kind]], column: str, folder: Path) -> None:
    """Write the documents, a batch at a time."""
    report, schema = Report(), pa.schema([("text", pa.string())])
    with new_folder(folder) as unfinished:
        total = sum(os.path.getsize(file) for file, _ in files)
        with (
            pa.OSFile(str(unfinished / "documents.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
            tqdm(total=total, unit="B", unit_scale=True, desc="reading files", disable=None, leave=False) as bar,
        ):
            batch: list[str] = []
            size = 0
            for file, kind in files:
                for text in _documents(file, kind, column, report):
                    batch.append(text)
                    size += len(text)
                    if size >= BATCH_BYTES or len(batch) == 10_000:
                        writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema))
                        batch, size = [], 0
                bar.update(os.path.getsize(file))
            writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema))
        (unfinished / "report.json").write_text(json.dumps(vars(report)))


def _documents(file: str, kind: Kind, column: str, report: Report) -> Iterator[str]:
    read = size = 0
    mended = False
    try:
        for text in _read(file, kind, column):
            if not text.isascii():
                whole = text.encode("utf-8", "surrogatepass")
                try:
                    whole.decode("utf-8")
                except UnicodeDecodeError:
                    if not mended:
                        report.note("hold halves of surrogate pairs, which were replaced by U+FFFD", file)
                    mended = True
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                length = len(whole)
            else:
                length = len(text)
            if length > DOCUMENT_BYTES:
                raise ValueError(f"a document of {length:,} bytes, of at most {DOCUMENT_BYTES:,}: split it")
            size += length
            read += 1
            yield text
    except UnreadableError as error:
        report.leave_out(str(error), file)
        return
    except ColumnError:
        raise
    except DAMAGES as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DamagedError(f"{printable(file)}: {reason}") from error
    report.files[kind] += 1
    report.file_bytes += os.path.getsize(file)
    report.documents[kind] += read
    report.bytes[kind] += size
