"""Small random encoders under the names of published ones."""

from pathlib import Path

WORDS = [
    "passage",
    "of",
    "many",
    "words",
    "who",
    "wrote",
    "hamlet",
    "capital",
    "france",
    *"0123456789",
    *"abcdefghijklmnopqrstuvwxyz",
]


def build_tokenizer(folder: Path) -> int:
    """A word tokenizer with RoBERTa's special tokens and numbers (<s> 0, <pad> 1, </s> 2); returns the size of its
    vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, model_input_names=["input_ids", "attention_mask"]
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def build_ance(folder: Path, wrapper: str = "", form: str = "model.safetensors") -> None:
    """A random RoBERTa of two layers with ANCE's head, saved as castorini/ance-msmarco-passage is: roberta.*,
    embeddingHead.*, norm.*."""
    import torch
    from safetensors.torch import save_file
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    size = build_tokenizer(folder)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 66,
    }
    config = RobertaConfig(
        vocab_size=size,
        initializer_range=0.5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        type_vocab_size=1,
        **sizes,
    )
    model, linear, norm = (
        RobertaModel(config, add_pooling_layer=True),
        torch.nn.Linear(32, 768),
        torch.nn.LayerNorm(768),
    )
    torch.nn.init.normal_(norm.weight)
    weights = {f"roberta.{name}": value for name, value in model.state_dict().items()}
    weights |= {"classifier.dense.weight": torch.zeros(32, 32)}  # the published files carry what their base class has
    weights |= {f"embeddingHead.{name}": value for name, value in linear.state_dict().items()}
    weights |= {f"norm.{name}": value for name, value in norm.state_dict().items()}
    weights = {wrapper + name: value.contiguous() for name, value in weights.items()}
    if form.endswith(".safetensors"):
        save_file(weights, folder / form)
    else:
        torch.save(weights, folder / form)
    config.save_pretrained(folder)
