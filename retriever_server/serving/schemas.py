"""The wire: requests, answers and the limits of one request."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; a larger one is refused with 413 (bytes) or 422 (the others)."""

    request_bytes: int = 64 << 20
    items: int = 10_000  # queries or items a request
    query_chars: int = 1_000_000
    results: int = 500_000  # queries x k


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class IndexChoice(Strict):
    index: str | None = Field(
        None, description="name of an index, or several joined by '+' whose lists are fused; null: the first"
    )
    indexes: Annotated[list[str], Field(min_length=1, json_schema_extra={"uniqueItems": True})] | None = Field(
        None, description="instead of index: the names one by one"
    )
    rrf_k: Count = Field(
        60, description="of reciprocal rank fusion: a passage scores the sum of 1 / (rrf_k + its rank in each list)"
    )


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


class SimilarityItem(Strict):
    id: str
    output: str
    question: str
    positives: list[str] | None = Field(None, description="texts that the output should stand near")
    gold_docids: list[str] | None = Field(None, description="instead of positives: passages of the index")


class SimilarityRequest(IndexChoice):
    items: list[SimilarityItem]


class RetrieveRequest(BaseModel):
    """The reference server's wire; unknown fields are passed over, and "100" is taken for 100, as it does."""

    queries: list[str]
    query_ids: list[str]
    topk: Count | None = None
    return_scores: bool = False
    max_length: Count | None = (
        None  # words (split at spaces) that are kept of a query; the reference cuts at 1024 where none is given
    )


class RankResponse(BaseModel):
    index_id: str
    ranks: dict[str, int | None] = Field(
        description="item id -> 1-based rank of its best gold passage; null: not within depth"
    )
    errors: dict[str, str] = Field(description="item id -> why it has no answer")


class SimilarityResponse(BaseModel):
    model: str = Field(description="the encoder")
    gains: dict[str, float] = Field(
        description="item id -> mean over its positives d of cos(output, d) - cos(question, d)"
    )
    errors: dict[str, str] = Field(description="item id -> why it has no answer")


class Hit(BaseModel):
    docid: str
    score: float
    contents: str | None = Field(None, description="only where the request asks for contents")


class SearchResponse(BaseModel):
    index_id: str
    results: list[list[Hit]] = Field(description="one list a query, best first")
    errors: dict[str, str] | None = Field(
        None, description="position -> why it has no answer; absent where all have one"
    )


class RetrieveResponse(BaseModel):
    result: list[int] | list[list[int] | list[list[float]]] = Field(
        description="ranks, or [ranks, scores] with return_scores"
    )
    errors: dict[str, str] | None = Field(
        None, description="position -> why its rank is -1; absent where there is none"
    )


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
