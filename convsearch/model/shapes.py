"""The size of a Llama or Qwen2 decoder from a dozen integers: parameters, operations per token. Without torch."""

from dataclasses import dataclass
from pathlib import Path

from convsearch.files import read_json


@dataclass(frozen=True, slots=True)
class Shape:
    """``Shape(2048, layers=36, heads=16, kv_heads=2, head_size=128, inner=11008, vocabulary=151936, tied=True)``"""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int  # width of the feed-forward layers
    vocabulary: int
    tied: bool  # whether the output layer is the embedding
    biases: bool = False  # whether query, key and value have biases, as in Qwen2

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        wide, narrow = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = 2 * self.hidden * wide + 2 * self.hidden * narrow + (wide + 2 * narrow if self.biases else 0)
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Tied weights count once, as they are stored."""
        return self.layers * self.layer + self.hidden + self.embedding * (1 if self.tied else 2)

    def forward_flops(self, tokens: float, scored_tokens: float, attended: float) -> float:
        """Operations of a forward pass: 2 per parameter and token, and the two products of attention.

        Args:
            tokens: number of tokens that go through the layers.
            scored_tokens: number of tokens that need logits (2 operations per parameter of the output layer).
            attended: sum over the tokens of the number of positions that each attends to.
        """
        attention = 4 * self.layers * self.heads * self.head_size * attended
        return 2 * self.layers * self.layer * tokens + 2 * self.embedding * scored_tokens + attention

    @classmethod
    def of_config(cls, config: dict[str, object]) -> "Shape":
        """From the fields of a Hugging Face config.json. Raises ValueError for another type of model."""
        if config.get("model_type") not in ("llama", "qwen2"):
            raise ValueError(f"a model of type {config.get('model_type')!r} has no shape: use llama or qwen2")

        def number(name: str, default: int = 0) -> int:
            value = config.get(name) or default
            assert isinstance(value, int), (name, value)
            return value

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        return cls(
            hidden=hidden,
            layers=number("num_hidden_layers"),
            heads=heads,
            kv_heads=number("num_key_value_heads", heads),
            head_size=number("head_dim", hidden // heads),
            inner=number("intermediate_size"),
            vocabulary=number("vocab_size"),
            tied=bool(config.get("tie_word_embeddings")),
            biases=config["model_type"] == "qwen2",
        )


# From the published config.json files, to plan a run before the weights are downloaded.
PUBLISHED = {
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(1536, 28, 12, 2, 128, 8960, 151_936, True, True),
    "Qwen/Qwen2.5-3B-Instruct": Shape(2048, 36, 16, 2, 128, 11_008, 151_936, True, True),
    "Qwen/Qwen2.5-7B-Instruct": Shape(3584, 28, 28, 4, 128, 18_944, 152_064, False, True),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(3072, 28, 24, 8, 128, 8192, 128_256, True),
    "smollm2-135m": Shape(576, 30, 9, 3, 64, 1536, 49_152, True),
}


def shape_of(model: str) -> Shape | None:
    """The shape of a model folder, or of a published model by its name; None for others."""
    path = Path(model) / "config.json"
    if path.is_file():
        return Shape.of_config(read_json(path, "export or download the model again"))
    return PUBLISHED.get(model) or PUBLISHED.get(Path(model).name)
