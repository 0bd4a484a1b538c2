"""Config: YAML and overrides to frozen dataclasses. The only place that knows omegaconf."""

from alignkit.config.estimate import estimate
from alignkit.config.export import configuration_markdown, explain, json_schema
from alignkit.config.load import LoadedConfig, load_config

__all__ = ["LoadedConfig", "configuration_markdown", "estimate", "explain", "json_schema", "load_config"]
