"""Configuration: a frozen pydantic model, composed by Hydra of files of ``configs/`` and overrides.

config = load_grpo_config(sys.argv[1:])          # --help prints the keys and exits; ValueError for every mistake
"""

from convsearch.config.grpo import GrpoConfig
from convsearch.config.load import config_dir, help_text, load_grpo_config, load_sft_config
from convsearch.config.sft import SftConfig

__all__ = ["GrpoConfig", "SftConfig", "config_dir", "help_text", "load_grpo_config", "load_sft_config"]
