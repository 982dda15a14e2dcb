"""The folder of a dense index while it is written, whether its vectors are encoded or imported."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from convsearch import checksums
from convsearch.files import read_jsonl
from retriever_server import storage
from retriever_server.dense import codes
from retriever_server.dense.manifest import Manifest, read_matrix
from retriever_server.storage import Array, StringTableWriter

DTYPES = ("float32", "float16")


def already_built(folder: Path, wanted: Manifest, overwrite: bool) -> bool:
    """As storage.already_built, by the index id."""

    def differences() -> list[str]:
        found = Manifest.read(folder).index_id
        checksums.check(folder, storage.AGAIN)
        return [] if found == wanted.index_id else [f"the id {found} (asked: {wanted.index_id})"]

    return storage.already_built(folder, differences, overwrite)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def write_texts(folder: Path, paths: Sequence[Path], progress: bool) -> int:
    """Streams a collection into the tables of docids and contents; returns the number of passages.

    Raises:
        ValueError: a line is malformed, a docid is given twice, or there is no passage.
    """
    docids, contents = StringTableWriter(folder, "docids"), StringTableWriter(folder, "contents")
    count = 0
    with storage.bar(progress, desc="read passages", unit=" passages") as bar:
        for path in paths:
            for line, record in read_jsonl(path):
                docid, text = record.get("id"), record.get("contents")
                if not isinstance(docid, str) or not docid or docid != docid.encode("utf-8", "replace").decode():
                    wanted = "must be a non-empty string of valid Unicode"
                    raise ValueError(f"{path}:{line}: field 'id' {wanted}, got {docid!r}")
                if not isinstance(text, str):
                    raise ValueError(f"{path}:{line}: field 'contents' must be a string, got {text!r}")
                docids.append(docid.encode())
                contents.append(text.encode("utf-8", "replace"))
                count += 1
                bar.update()
    docids.close()
    contents.close()
    if count == 0:
        raise ValueError(f"{', '.join(map(str, paths))}: no passage in it")
    write_docid_dictionary(folder, count)
    return count


def write_docid_dictionary(folder: Path, count: int) -> None:
    """ValueError if two docids are equal."""
    table = storage.load_strings(folder, "docids", count)
    hashes = np.fromiter((storage.string_hash(table.bytes_at(i)) for i in range(count)), np.uint64, count)
    if twice := storage.write_dictionary(folder, "docids", hashes, table):
        where = f"passages {twice[0] + 1} and {twice[1] + 1}"
        raise ValueError(f"docid {table[twice[0]]!r} is given twice ({where}): make docids unique")


def check_vectors(vectors: Array, first: int) -> Array:
    """Returns ``vectors``, the first of which is passage ``first``; ValueError if a value is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        what = f"the vector of passage {first + int(bad[0]) + 1} has values that are not finite in {vectors.dtype}"
        raise ValueError(f"{what}: use --dtype float32, or check the encoder")
    return vectors


def finish(building: Path, folder: Path, manifest: Manifest, progress: bool) -> None:
    """Adds codes and manifest, and renames the folder; replaces what had that name (the caller has checked it)."""
    vectors = read_matrix(building, manifest)
    with storage.bar(progress, total=len(vectors), desc="codes", unit=" passages") as bar:
        codes.write(building, vectors, bar.update)
    storage.write_manifest(building, asdict(manifest))
    shutil.rmtree(building / "done", ignore_errors=True)
    (building / "plan.json").unlink(missing_ok=True)
    storage.publish(building, folder, replace=True)
