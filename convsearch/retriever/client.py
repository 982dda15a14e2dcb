"""The HTTP client of the retriever server: exact gold ranks, similarity gains and searches.

A server that does not answer is never a rank of "not found": the client repeats a request for ``max_wait_s``, then
raises RetrieverError. What the server refuses (an unknown docid, a query that is too long) is a ValueError that names
the item.
"""

import itertools
import json
import random
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from convsearch.cli import Unavailable
from convsearch.rewards.shapes import Feedback
from convsearch.types import Example

CHARS_PER_REQUEST = 2_000_000
ITEMS_PER_REQUEST = 512
RESULTS_PER_REQUEST = 50_000  # queries x k; a tenth of it with contents
SILENT_ATTEMPTS = 3  # then the wait is announced
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
START_COMMAND = "`python -m retriever_server --index_path INDEX --port 8000`"
T = TypeVar("T")


class RetrieverError(Unavailable):
    """The retriever did not answer, or what answered is not a retriever."""


class Hit(NamedTuple):
    """One search result. ``Hit("d17", 4.25)``; ``contents`` is None unless the search asked for it."""

    docid: str
    score: float
    contents: str | None = None


class RetrieverClient:
    """Talks to one server, from any number of threads. Close it, or use it as a context manager.

    Example: ``RetrieverClient("http://127.0.0.1:8000").gold_ranks([["d17"]], ["who wrote Hamlet?"])`` is ``[1]``.
    """

    def __init__(
        self, url: str, depth: int = 100, timeout_s: float = 60, max_wait_s: float = 300, index: str | None = None
    ) -> None:
        """
        Args:
            url: ``http://HOST:PORT`` of the server.
            depth: a rank beyond it is None.
            timeout_s: limit of one attempt.
            max_wait_s: limit of all attempts of one request.
            index: name of the index, for a server with several; None: its first.

        Raises:
            ValueError: an argument is out of range, or the url is not an http one.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"a retriever's url must be http://HOST:PORT, got {url!r}")
        for name, value in (("depth", depth), ("timeout_s", timeout_s), ("max_wait_s", max_wait_s)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.url, self.depth, self.index = url.rstrip("/"), depth, index
        self.timeout_s, self.max_wait_s = timeout_s, max_wait_s
        loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(trust_env=not loopback)  # a proxy cannot reach this machine's own ports
        self._requests = itertools.count()
        self._ranked_by: object = None  # the id of the index that has given ranks
        self._id = uuid.uuid4().hex  # the server's queue has one place per client, for all its connections
        self._random = random.Random()  # jitter must not advance the global generator, which experiments seed

    def feedback(
        self, examples_N: Sequence[Example], texts_N: Sequence[str | None], signals: Collection[str]
    ) -> list[Feedback]:
        """Implements ``convsearch.rewards.scoring.Retriever``. Raises as ``gold_ranks`` and ``similarity_gains`` do."""
        ranks_N = self.gold_ranks([example.gold_docids for example in examples_N], texts_N)
        gains_N = self.similarity_gains(examples_N, texts_N) if "gain" in signals else [None] * len(texts_N)
        return list(map(Feedback, ranks_N, gains_N))

    def gold_ranks(self, golds: Sequence[Sequence[str]], queries: Sequence[str | None]) -> list[int | None]:
        """The exact 1-based rank of each query's best gold passage; None if it is beyond ``depth`` or scores 0.

        The rank of a query that is None (nothing parsed) is None. Equal (query, golds) pairs are sent once.

        Raises:
            ValueError: the lengths differ, a query has no gold, or the server knows no such docid; names the item.
            RetrieverError: no answer within ``max_wait_s``.
        """
        if len(golds) != len(queries):
            raise ValueError(f"{len(golds)} lists of gold docids but {len(queries)} queries")
        first: dict[tuple[str, tuple[str, ...]], int] = {}  # pair -> the first item that has it
        pairs: list[tuple[str, tuple[str, ...]] | None] = []
        for number, (docids, query) in enumerate(zip(golds, queries, strict=True)):
            pair = None if query is None else (clean(query), tuple(docids))
            pairs.append(pair)
            if pair is not None:
                if isinstance(docids, str) or not docids:
                    problem = f"needs a list of at least one gold docid, got {docids!r}"
                    raise ValueError(f"item {number} ({short(pair[0])}) {problem}")
                first.setdefault(pair, number)
        ranks: dict[int, int | None] = {}
        items = [(number, *pair) for pair, number in first.items()]
        for chunk in chunks(items, ITEMS_PER_REQUEST, lambda item: len(item[1])):
            ranks |= self._rank_chunk(chunk)
        return [None if pair is None else ranks[first[pair]] for pair in pairs]

    def _rank_chunk(self, chunk: Sequence[tuple[int, str, tuple[str, ...]]]) -> dict[int, int | None]:
        ids = self._ids(number for number, _, _ in chunk)
        items = [{"id": ids[number], "query": query, "gold_docids": docids} for number, query, docids in chunk]
        answer = self._request("POST", "/rank", {"depth": self.depth, "index": self.index, "items": items})
        ranks, errors = answer.get("ranks"), answer.get("errors")
        if not isinstance(ranks, dict) or not isinstance(errors, dict):
            raise self._not_ours("/rank", answer)
        self._check_index(answer.get("index_id"))
        for number, query, _ in chunk:
            if ids[number] in errors:
                raise ValueError(f"retriever {self.url}: item {number} ({short(query)}): {errors[ids[number]]}")
            rank = ranks.get(ids[number], "no answer")
            if rank is not None and (type(rank) is not int or not 1 <= rank <= self.depth):
                expected = f"a rank from 1 to {self.depth} or null"
                raise RetrieverError(f"retriever {self.url} answered {rank!r} for item {number}: expected {expected}")
        return {number: ranks[ids[number]] for number, _, _ in chunk}

    def _ids(self, numbers: Iterable[int]) -> dict[int, str]:
        """An id for each item of a request that no other request has: a reply that is sent twice fits no other."""
        request = next(self._requests)
        return {number: f"{request}-{number}" for number in numbers}

    def _check_index(self, index_id: object) -> None:
        """Ranks of two indexes would not compare: raises RetrieverError if the index behind the url has changed."""
        self._ranked_by = self._ranked_by or index_id
        if index_id != self._ranked_by:
            changed = f"was the index {self._ranked_by} and is {index_id} now"
            raise RetrieverError(f"what answers at {self.url} {changed}: start the first one again")

    def search(self, queries: Sequence[str], k: int, contents: bool = False) -> list[list[Hit]]:
        """Each query's best ``k`` passages with a score above 0, best first.

        Raises:
            ValueError: the server refuses the request.
            RetrieverError: no answer within ``max_wait_s``.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        most = max(1, min(ITEMS_PER_REQUEST, RESULTS_PER_REQUEST // (k * (10 if contents else 1))))
        results: list[list[Hit]] = []
        for chunk in chunks([clean(query) for query in queries], most, len):
            request = {"queries": chunk, "k": k, "index": self.index, "contents": contents}
            answer = self._request("POST", "/search", request).get("results")
            if not isinstance(answer, list) or len(answer) != len(chunk):
                raise self._not_ours("/search", answer)
            results += [[Hit(hit["docid"], hit["score"], hit.get("contents")) for hit in hits] for hits in answer]
        return results

    def similarity_gains(self, examples: Sequence[Example], outputs: Sequence[str | None]) -> list[float | None]:
        """Mean over the positives d of cos(output, d) - cos(question, d); None for an output that is None.

        The positives are the texts of ``Example.positives``; if an example has none, its gold passages.

        Raises:
            ValueError: the lengths differ, the server has no encoder, or it does not have such a docid.
            RetrieverError: no answer within ``max_wait_s``.
        """
        items: list[tuple[int, dict[str, Any]]] = []
        for number, (example, output) in enumerate(zip(examples, outputs, strict=True)):
            if output is not None:
                texts = [clean(text) for text in example.positives]
                near = {"positives": texts} if texts else {"gold_docids": list(example.gold_docids)}
                both = {"output": clean(output), "question": clean(example.question)}
                items.append((number, {**both, **near}))
        gains: list[float | None] = [None] * len(outputs)
        for chunk in chunks(items, ITEMS_PER_REQUEST, lambda item: len(json.dumps(item[1]))):
            ids = self._ids(number for number, _ in chunk)
            named = [{"id": ids[number], **item} for number, item in chunk]
            answer = self._request("POST", "/similarity", {"index": self.index, "items": named})
            errors, found = answer.get("errors", {}), answer.get("gains")
            for number, item in chunk:
                name = ids[number]
                if name in errors:
                    raise ValueError(f"retriever {self.url}: item {number} ({short(item['output'])}): {errors[name]}")
                if not isinstance(found, dict) or not isinstance(found.get(name), float):
                    raise self._not_ours("/similarity", answer)
                gains[number] = found[name]
        return gains

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index.

        Raises:
            ValueError: the server does not have the index.
            RetrieverError: no answer within ``max_wait_s``.
        """
        absent: list[str] = []
        for chunk in chunks(docids, ITEMS_PER_REQUEST, len):
            answer = self._request("POST", "/missing", {"index": self.index, "docids": chunk}).get("missing")
            if not isinstance(answer, list) or not set(answer) <= set(chunk):
                raise self._not_ours("/missing", answer)
            absent += answer
        return absent

    def health(self) -> dict[str, Any]:
        """The server's status, index_id, retriever, passages and version; waits as every request does."""
        answer = self._request("GET", "/health", None)
        if answer.get("status") != "ok" or not isinstance(answer.get("indexes"), dict):
            raise self._not_ours("/health", answer)
        return answer

    def index_id(self) -> str:
        """The id of the index that this client asks (of a fusion, all ids); ValueError if the server lacks it."""
        indexes = self.health()["indexes"]
        name = self.index or next(iter(indexes))
        names = [name] if name in indexes else name.split("+")
        if absent := [one for one in names if one not in indexes]:
            raise ValueError(f"retriever {self.url} has no index {absent[0]!r}: it has {', '.join(indexes)}")
        return "+".join(indexes[one]["index_id"] for one in names)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _before_attempt(self, deadline: float) -> None:
        """For subclasses: makes sure that a server runs, or raises RetrieverError at ``deadline`` (time.monotonic)."""

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Sends a request until the server answers; retries after connection errors, timeouts, 502, 503 and 504."""
        start, pause_s, attempts = time.monotonic(), FIRST_PAUSE_S, 0
        deadline = start + self.max_wait_s
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-client-id": self._id}
        while True:
            asked_s, attempts = 0.0, attempts + 1
            self._before_attempt(deadline)
            try:
                left_s = max(deadline - time.monotonic(), 0.05)
                response = self._http.request(
                    method, self.url + path, content=content, headers=headers, timeout=min(self.timeout_s, left_s)
                )
                if response.status_code not in (502, 503, 504):
                    return self._read(path, response)
                problem, asked_s = f"HTTP status {response.status_code}", _retry_after_s(response)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            # more than the server asks for: clients that were refused together must not return together
            wait_s = asked_s + pause_s * self._random.uniform(0.5, 1)
            if time.monotonic() + wait_s >= deadline:
                tried = f"{attempts} attempts, limit {self.max_wait_s:g} s; last: {problem}"
                raise RetrieverError(
                    f"the retriever at {self.url} did not answer {path} for {time.monotonic() - start:.0f} s ({tried})"
                    f": start one with {START_COMMAND} and run again"
                )
            if attempts == SILENT_ATTEMPTS:
                print(f"retriever {self.url}: no answer ({problem}); trying for {self.max_wait_s:g} s", file=sys.stderr)
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _read(self, path: str, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = response.text[:200]
        if 400 <= response.status_code < 500:
            detail = answer.get("detail") if isinstance(answer, dict) else answer
            raise ValueError(f"retriever {self.url} refused {path} with status {response.status_code}: {detail}")
        if response.status_code != 200:
            problem = f"failed at {path} with status {response.status_code}"
            raise RetrieverError(f"retriever {self.url} {problem}: see its log for the reason")
        if not isinstance(answer, dict):
            raise self._not_ours(path, answer)
        return answer

    def _not_ours(self, path: str, answer: object) -> RetrieverError:
        said = f"answers {path} with {str(answer)[:100]!r}"
        return RetrieverError(f"{self.url} {said}, which is not an answer of our retriever server: check the url")


def clean(text: str) -> str:
    """Replaces halves of surrogate pairs, which a broken output may have: they have no UTF-8 form."""
    return text.encode("utf-8", "replace").decode("utf-8")


def short(text: str) -> str:
    """A text for an error message, quoted, at most 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def chunks(items: Sequence[T], most: int, chars_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive chunks of at most ``most`` items and about CHARS_PER_REQUEST characters."""
    chunk: list[T] = []
    chars = 0
    for item in items:
        size = chars_of(item)
        if chunk and (len(chunk) == most or chars + size > CHARS_PER_REQUEST):
            yield chunk
            chunk, chars = [], 0
        chunk.append(item)
        chars += size
    if chunk:
        yield chunk


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds of a Retry-After header; 0 without one (or with a date, which our server does not send)."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0
