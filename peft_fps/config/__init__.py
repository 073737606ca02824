"""The config of an adapter: what the user asks for, and what saving has recorded.

| module | subject |
|---|---|
| `fps_config` | `FPSConfig`, every option with its default |
| `config_fields` | checks of the options |
| `config_file` | writing `adapter_config.json`, and reading it |
| `config_lookup` | finding an adapter's config in a model |
"""

from peft_fps.config.config_lookup import adapter_config
from peft_fps.config.fps_config import DEFAULT_BUDGET, FPSConfig


__all__ = ["DEFAULT_BUDGET", "FPSConfig", "adapter_config"]
