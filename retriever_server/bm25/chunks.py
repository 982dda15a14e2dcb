"""One chunk of a collection, inverted: what the building processes send back. They share nothing but these arrays."""

import json
from dataclasses import dataclass

import numpy as np

from retriever_server.bm25.bulk_analyzer import BulkAnalyzer
from retriever_server.bm25.formula import length_bytes
from retriever_server.storage import Array, string_hash

CHUNK_BYTES = 4 << 20  # of collection text: about 8,000 passages, 20 MB between processes


@dataclass(frozen=True, slots=True)
class Chunk:
    """N passages, numbered from 0, and their P postings; the postings of a term are in the order of passages.

    Example: "cat dog cat" and "dog" -> terms ["cat", "dog"], postings_term [0, 1, 1], postings_doc [0, 0, 1], tf [2, 1,
        1].
    """

    docids: bytes  # UTF-8, one after the other
    docid_lengths: Array  # int64[N], bytes
    docid_hashes: Array  # uint64[N]
    contents: bytes
    content_lengths: Array  # int64[N], bytes
    num_tokens: int
    num_nonempty: int
    terms: list[str]
    postings_term: Array  # int32[P], into terms
    postings_doc: Array  # int32[P]
    postings_pair: Array  # uint32[P]: tf x 256 + length byte


_analyzer = BulkAnalyzer()  # of this process: it remembers the words of earlier chunks


def invert(path: str, first_line: int, lines: bytes) -> Chunk:
    """Parses and analyses whole lines of a collection file, the first of which has the number ``first_line``.

    Raises:
        ValueError: a line is malformed; names the file, the line and the field.
    """
    docids, contents, hashes = [], [], []
    for number, line in enumerate(lines.split(b"\n"), start=first_line):
        if not line or line.isspace():
            continue
        docid, text = passage(line, f"{path}:{number}")
        docids.append(docid)
        hashes.append(string_hash(docid))
        contents.append(text)
    tokens, lengths = _analyzer(contents)
    terms, of_posting, doc, tf = _count(tokens, lengths)
    return Chunk(
        docids=b"".join(docids),
        docid_lengths=np.fromiter(map(len, docids), np.int64),
        docid_hashes=np.array(hashes, np.uint64),
        contents=b"".join(contents),
        content_lengths=np.fromiter(map(len, contents), np.int64),
        num_tokens=len(tokens),
        num_nonempty=int(np.count_nonzero(lengths)),
        terms=terms,
        postings_term=of_posting,
        postings_doc=doc.astype(np.int32),
        postings_pair=tf.astype(np.uint32) << 8 | length_bytes(lengths)[doc],
    )


def _count(tokens: Array, lengths: Array) -> tuple[list[str], Array, Array, Array]:
    """The chunk's terms in alphabetical order, so in any process the same, and (term, passage, times) of each pair."""
    passages = max(len(lengths), 1)
    keys, times = np.unique(tokens * passages + np.repeat(np.arange(len(lengths)), lengths), return_counts=True)
    distinct, of_posting = np.unique(keys // passages, return_inverse=True)
    vocabulary = list(_analyzer.vocabulary)
    found = [vocabulary[number] for number in distinct.tolist()]
    order = sorted(range(len(found)), key=found.__getitem__)
    place = np.empty(len(found), np.int32)
    place[order] = np.arange(len(found), dtype=np.int32)
    return [found[number] for number in order], place[of_posting], keys % passages, times


def passage(line: bytes, where: str) -> tuple[bytes, bytes]:
    """A collection line's docid and contents in UTF-8; ValueError names what is wrong with it."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {str(record)[:80]}")
    docid, contents = record.get("id"), record.get("contents")
    if not isinstance(docid, str) or not docid:
        raise ValueError(f"{where}: field 'id' must be a non-empty string, got {docid!r}")
    if not isinstance(contents, str):
        raise ValueError(f"{where}: field 'contents' must be a string, got {contents!r}")
    try:
        key = docid.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field 'id' is not valid Unicode: {docid!r}") from error
    return key, contents.encode("utf-8", "replace")  # halves of surrogate pairs become "?"
