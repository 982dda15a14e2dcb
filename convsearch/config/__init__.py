"""Configuration: Hydra composes the files of ``configs/`` and the command line's overrides; what leaves here is a frozen pydantic model.

config = load_grpo_config(sys.argv[1:])          # prints the help and exits for --help; ValueError for anything wrong
"""

from convsearch.config.grpo import GrpoConfig
from convsearch.config.load import config_dir, help_text, load_grpo_config, load_sft_config
from convsearch.config.sft import SftConfig

__all__ = ["GrpoConfig", "SftConfig", "config_dir", "help_text", "load_grpo_config", "load_sft_config"]
