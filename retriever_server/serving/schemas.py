"""The wire: requests, answers and the limits of one request."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = "0.1.0"  # of the wire, in /health
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; a larger one is refused with 413 (bytes) or 422 (the others)."""

    request_bytes: int = 64 << 20
    items: int = 10_000  # queries or items
    query_chars: int = 1_000_000
    results: int = 500_000  # queries x k


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class IndexChoice(Strict):
    index: str | None = Field(
        None, description="an index's name, or several joined by '+' to be fused; null: the first"
    )
    indexes: Annotated[list[str], Field(min_length=1, json_schema_extra={"uniqueItems": True})] | None = Field(
        None, description="instead of index: the names one by one"
    )
    rrf_k: Count = Field(60, description="a fused passage scores the sum of 1 / (rrf_k + its rank in each list)")


class RankItem(Strict):
    id: str
    query: str
    gold_docids: list[str] | None = None
    qid: str | None = Field(None, description="a query of the server's qrels, instead of gold_docids")


class RankRequest(IndexChoice):
    items: list[RankItem]
    depth: Count = 100


class SearchRequest(IndexChoice):
    queries: list[str]
    k: Count
    contents: bool = False


class MissingRequest(IndexChoice):
    docids: list[str]


class SimilarityItem(Strict):
    id: str
    output: str
    question: str
    positives: list[str] | None = Field(None, description="texts that the output should be near")
    gold_docids: list[str] | None = Field(None, description="instead of positives: passages of the index")


class SimilarityRequest(IndexChoice):
    items: list[SimilarityItem]


class RetrieveRequest(BaseModel):
    """The reference server's wire: like it, ignores unknown fields and accepts "100" for 100."""

    queries: list[str]
    query_ids: list[str]
    topk: Count | None = None
    return_scores: bool = False
    # words (split at spaces) that are kept of a query; if it is not given, the reference cuts at 1024
    max_length: Count | None = None


class RankResponse(BaseModel):
    index_id: str
    ranks: dict[str, int | None] = Field(description="item id -> 1-based rank of its best gold; null: not within depth")
    errors: dict[str, str] = Field(description="item id -> why it has no answer")


class MissingResponse(BaseModel):
    index_id: str
    missing: list[str] = Field(description="those docids that are not in the index, in the order of the request")


class SimilarityResponse(BaseModel):
    model: str = Field(description="the encoder")
    gains: dict[str, float] = Field(description="item id -> mean of cos(output, d) - cos(question, d) over positives d")
    errors: dict[str, str] = Field(description="item id -> why it has no answer")


class Hit(BaseModel):
    docid: str
    score: float
    contents: str | None = Field(None, description="only if the request has contents: true")


class SearchResponse(BaseModel):
    index_id: str
    results: list[list[Hit]] = Field(description="one list per query, best first")
    errors: dict[str, str] | None = Field(None, description="position -> why it has no answer; absent if all have one")


class RetrieveResponse(BaseModel):
    result: list[int] | list[list[int] | list[list[float]]] = Field(
        description="ranks, with return_scores [ranks, scores]"
    )
    errors: dict[str, str] | None = Field(None, description="position -> why its rank is -1; absent if there is none")


class IndexAbout(BaseModel):
    index_id: str
    retriever: str
    passages: int


class HealthResponse(IndexAbout):
    status: Literal["ok"]
    version: str
    indexes: dict[str, IndexAbout]


class Refusal(BaseModel):
    detail: str = Field(description="one sentence: what is wrong and what to do")
