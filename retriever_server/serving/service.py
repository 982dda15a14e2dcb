"""The work behind the endpoints, without HTTP except for the status of a refusal."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import HTTPException

from retriever_server.base import Hits
from retriever_server.searcher import Fusion, Searcher
from retriever_server.serving import schemas
from retriever_server.serving.batching import Batcher, BatchSettings, Key
from retriever_server.serving.rank_cache import RankCache, key_of
from retriever_server.serving.schemas import Limits, RankItem
from retriever_server.serving.telemetry import Telemetry
from retriever_server.similarity import Item, Similarity

T = TypeVar("T")
Pair = tuple[str, Sequence[str]]  # a query and its golds
Answer = dict[str, Any]
Errors = dict[str, str]  # item id -> a sentence


class Service:
    """Answers requests of any number of clients; an item that cannot be answered has a sentence in "errors" instead."""

    def __init__(
        self,
        indexes: Mapping[str, Searcher],
        qrels: Mapping[str, Sequence[str]] | None,
        limits: Limits,
        settings: BatchSettings,
        cache: RankCache | None = None,
        similarity: Similarity | None = None,
    ) -> None:
        """``indexes``: name -> index, the first is the default. ``qrels``: query id -> gold docids, or None.

        Raises:
            ValueError: a request of the largest size would never fit into the queue.
        """
        assert indexes
        if settings.max_queue < limits.items:
            what = f"--max_queue {settings.max_queue} is less than --max_items {limits.items}"
            raise ValueError(f"{what}: lower the latter, a full request must fit")
        self.indexes, self.qrels, self.limits, self.cache, self.similarity = indexes, qrels, limits, cache, similarity
        self.default = next(iter(indexes.values()))
        self.telemetry = Telemetry()
        self.batcher = Batcher(settings, self.telemetry)
        watch = self.telemetry.watch
        watch("retriever_queue_items", "Items waiting for a searcher", lambda: self.batcher.waiting)
        watch("retriever_admitted_items", "Items of requests without an answer", lambda: self.batcher.admitted)
        self.active = 0  # requests that are being answered
        self.draining = False
        # for what is neither a search nor quick: looking up docids and texts, the cache, writing JSON
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="helper")

    def close(self) -> None:
        self.batcher.close()
        self._helpers.shutdown(wait=False)
        if self.cache is not None:
            self.cache.close()

    async def _aside(self, task: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._helpers, task, *arguments)

    def searcher(self, choice: schemas.IndexChoice) -> Searcher:
        """The index that a request names, or the fusion of those that it names."""
        if choice.index is not None and choice.indexes is not None:
            raise HTTPException(422, "give index or indexes, not both")
        if choice.index is None and choice.indexes is None:
            return self.default
        names = choice.indexes or [choice.index or ""]
        if choice.index is not None and choice.index not in self.indexes:
            names = choice.index.split("+")
        for number, name in enumerate(names):
            if name not in self.indexes:
                raise HTTPException(404, f"there is no index {name!r} here: this server has {', '.join(self.indexes)}")
            if name in names[:number]:
                raise HTTPException(422, f"index {name!r} is named twice: a fusion needs different indexes")
        chosen = [self.indexes[name] for name in names]
        return chosen[0] if len(chosen) == 1 else Fusion(chosen, choice.rrf_k)

    def check(self, queries: Sequence[str], results_each: int = 1) -> None:
        """HTTPException 422 if a request is above a limit."""
        items, chars, results, count = self.limits.items, self.limits.query_chars, self.limits.results, len(queries)
        if count > items:
            raise HTTPException(422, f"{count} queries in one request, the limit is {items}: split it into several")
        for number, query in enumerate(queries):
            if len(query) > chars:
                what = f"query {number} has {len(query)} characters, the limit is {chars}"
                raise HTTPException(422, f"{what}: shorten it")
        if count * results_each > results:
            what = f"{count} queries x {results_each} results, the limit is {results} per request"
            raise HTTPException(422, f"{what}: split it into several")

    def golds_of(self, qid: str) -> list[str]:
        if self.qrels is None:
            raise ValueError(f"qid {qid!r} is unknown: the server was started without --trec_path, so send gold_docids")
        if qid not in self.qrels:
            raise ValueError(f"qid {qid!r} is not in the server's qrels ({len(self.qrels)} queries)")
        return list(self.qrels[qid])

    def resolve(self, searcher: Searcher, gold_docids: Sequence[str] | None, qid: str | None) -> list[str]:
        """An item's gold docids; ValueError if there are none."""
        if (gold_docids is None) == (qid is None):
            raise ValueError("give exactly one of gold_docids and qid")
        golds = list(gold_docids) if qid is None and gold_docids is not None else self.golds_of(qid or "")
        if not golds:
            raise ValueError("gold_docids is empty")
        if missing := searcher.missing(golds):
            raise ValueError(f"docid {missing[0]!r} is not in the index {searcher.index_id}")
        return golds

    async def _resolved(self, items: Sequence[Any], resolve: Callable[[Any], T]) -> tuple[dict[str, T], Errors]:
        """item id -> what ``resolve`` returns, or the text of its ValueError."""

        def resolve_all() -> tuple[dict[str, T], Errors]:
            found: dict[str, T] = {}
            errors: Errors = {}
            for item in items:
                try:
                    found[item.id] = resolve(item)
                except ValueError as error:
                    errors[item.id] = str(error)
            return found, errors

        return await self._aside(resolve_all)

    async def rank(self, request: schemas.RankRequest, client: str) -> Answer:
        return await self._rank(self.searcher(request), request.items, request.depth, client)

    async def _rank(self, searcher: Searcher, items: Sequence[RankItem], depth: int, client: str) -> Answer:
        def pair(item: RankItem) -> Pair:
            return item.query, self.resolve(searcher, item.gold_docids, item.qid)

        def call(batch: Sequence[Pair]) -> Sequence[int | None]:
            return searcher.gold_ranks([query for query, _ in batch], [golds for _, golds in batch], depth)

        pairs, errors = await self._resolved(items, pair)
        known: dict[str, int | None] = {}
        keys: dict[str, bytes] = {}
        if self.cache is not None:
            keys, known = await self._aside(self._look_up, self.cache, searcher.index_id, pairs, depth)
        asked = [name for name in pairs if name not in known]
        key = Key("rank", searcher.index_id, depth)
        outcomes = await self.batcher.run(client, key, call, [pairs[name] for name in asked])
        found, failed = _split(dict(zip(asked, outcomes, strict=True)))
        if self.cache is not None and found:
            self._helpers.submit(self.cache.put, [(keys[name], rank) for name, rank in found.items()])
        known |= found
        ranks = {name: known[name] for name in pairs if name in known}
        return {"index_id": searcher.index_id, "ranks": ranks, "errors": errors | failed}

    def _look_up(
        self, cache: RankCache, index_id: str, pairs: Mapping[str, Pair], depth: int
    ) -> tuple[dict[str, bytes], dict[str, int | None]]:
        keys = {name: key_of(index_id, query, golds, depth) for name, (query, golds) in pairs.items()}
        found = cache.get(list(keys.values()))
        known = {name: found[key] for name, key in keys.items() if key in found}
        self.telemetry.cache(len(known), len(keys) - len(known))
        return keys, known

    async def missing(self, request: schemas.MissingRequest) -> Answer:
        searcher = self.searcher(request)
        return {"index_id": searcher.index_id, "missing": await self._aside(searcher.missing, request.docids)}

    async def search(self, request: schemas.SearchRequest, client: str) -> Answer:
        searcher = self.searcher(request)
        lists, errors = await self._search(searcher, request.queries, request.k, client)
        results = await self._aside(_described, searcher, lists, request.contents)
        return {"index_id": searcher.index_id, "results": results} | ({"errors": errors} if errors else {})

    async def _search(
        self, searcher: Searcher, queries: Sequence[str], k: int, client: str
    ) -> tuple[list[Hits], Errors]:
        """One list per query, empty if it has an entry (by position) in the errors."""
        key = Key("search", searcher.index_id, k)
        outcomes = await self.batcher.run(client, key, lambda batch: searcher.search(batch, k), queries)
        found, errors = _split({str(number): outcome for number, outcome in enumerate(outcomes)})
        return [found.get(str(number), []) for number in range(len(queries))], errors

    async def gains(self, request: schemas.SimilarityRequest, client: str) -> Answer:
        """The similarity gain of each item, by its positives' texts or by passages of the index."""
        similarity = self.similarity
        if similarity is None:
            remedy = "start it with --similarity_model MODEL"
            raise HTTPException(404, f"this server has no encoder for similarities: {remedy}")
        searcher = self.searcher(request)

        def resolve(item: schemas.SimilarityItem) -> Item:
            if (item.positives is None) == (item.gold_docids is None):
                raise ValueError("give exactly one of positives and gold_docids")
            texts = item.positives
            if texts is None:
                texts = searcher.contents(self.resolve(searcher, item.gold_docids, None))
            return Item(item.output, item.question, tuple(texts))

        items, errors = await self._resolved(request.items, resolve)
        key = Key("similarity", similarity.name, 0)
        outcomes = await self.batcher.run(client, key, similarity.gains, list(items.values()))
        gains, failed = _split(dict(zip(items, outcomes, strict=True)))
        return {"model": similarity.name, "gains": gains, "errors": errors | failed}

    async def retrieve(self, request: schemas.RetrieveRequest, client: str) -> Answer:
        """Ranks by position (-1: not found). An unknown query id gets -1 and an entry in "errors"."""
        depth = request.topk or 100
        queries = [" ".join(query.split(" ")[: request.max_length]) for query in request.queries]
        pairs = enumerate(zip(queries, request.query_ids, strict=True))
        items = [RankItem(id=str(i), query=query, qid=qid) for i, (query, qid) in pairs]
        answer = await self._rank(self.default, items, depth, client)
        ranks = [-1 if (rank := answer["ranks"].get(item.id)) is None else rank for item in items]
        result: list[Any] = ranks
        if request.return_scores:
            lists, _ = await self._search(self.default, queries, depth, client)
            result = [ranks, [[score for _, score in hits] for hits in lists]]
        return {"result": result} | ({"errors": answer["errors"]} if answer["errors"] else {})

    async def encoded(self, answer: Answer) -> bytes:
        return await self._aside(_json, answer)

    def health(self) -> Answer:
        about = {
            name: {"index_id": index.index_id, "retriever": index.name, "passages": index.num_passages}
            for name, index in self.indexes.items()
        }
        return {"status": "ok", **next(iter(about.values())), "version": schemas.VERSION, "indexes": about}


def _split(outcomes: Mapping[str, Any]) -> tuple[dict[str, Any], Errors]:
    """The results of the batcher, and the text of the ValueErrors among them."""
    errors = {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, ValueError)}
    return {name: outcome for name, outcome in outcomes.items() if name not in errors}, errors


def _described(searcher: Searcher, lists: Sequence[Hits], contents: bool) -> list[list[Answer]]:
    results: list[list[Answer]] = [[{"docid": docid, "score": score} for docid, score in hits] for hits in lists]
    if contents:
        texts = iter(searcher.contents([docid for hits in lists for docid, _ in hits]))
        for hits in results:
            for hit in hits:
                hit["contents"] = next(texts)
    return results


def _json(answer: Answer) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
