"""What a server runs with: a model's own config, and that of its engine."""

import dataclasses

from jaxgen.config import ServeConfig
from jaxgen.serve.config import EngineConfig


@dataclasses.dataclass(frozen=True)
class ServerConfig(ServeConfig):
    """What a trained model is served with."""

    engine: EngineConfig = EngineConfig()
    """How many requests are served at once, and how."""
