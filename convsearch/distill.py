"""Self-driven warm-up data: the base model rewrites the training set, the retriever says which rewrites are good (arXiv 2505.15776, section 3.2).

``python -m convsearch.distill --model_name_or_path BASE --input_path train.json --output_dir DIR --retriever_url embedded:INDEX``

k samples a conversation with the one-example prompt; a sample is kept when its form is right and its gold passage stands at rank 1. What is kept is
written to ``sft.parquet`` with the ZERO-shot prompt. All samples stay in ``samples.jsonl``, with ranks; the command resumes there when it is run again.
"""

from convsearch.cli import run
from convsearch.generation.distill import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run(main)
