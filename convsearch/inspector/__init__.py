"""A page that follows a GRPO run: ``python -m convsearch.inspect RUN_FOLDER``."""
