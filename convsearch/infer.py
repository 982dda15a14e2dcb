"""Conversations -> rewrites: ``python -m convsearch.infer --model_name_or_path MODEL --input_path dev.json --output_path rewrites.jsonl``.

Every input line comes out once, with ``rewrite`` (what to search for), ``reasoning_content``, ``output``, ``rewrite_error`` and ``fallback``. Where nothing
parses the raw question is the rewrite, counted and reported: leaving such lines out would inflate the metrics. Finished lines are kept when the command is
run again. ``--task rqr`` writes reasoned queries of single questions (BRIGHT's topics, or conversations), with RQR's prompt and sampling.
"""

from convsearch.cli import run
from convsearch.generation.infer import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run(main)
