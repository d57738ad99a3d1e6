"""Train and serve generative transformers in JAX, sharded over any mesh.

Importing this package imports neither JAX nor anything else that is heavy: each name of the public
API loads its module when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# The function `train` is left in its module, `jaxgen.train.loop`: here it would hide the package
# of the same name.
_MODULES = {
    "checkpoint.manager": ("CheckpointConfig", "CheckpointManager"),
    "compiler": ("enable_compilation_cache",),
    "config": ("ServeConfig", "TrainConfig", "load_config", "read_config", "save_config"),
    "data.loader": ("Batch", "Loader"),
    "data.config": ("DataConfig",),
    "data.dataset": ("prepare",),
    "data.sources": ("Source",),
    "data.tokenizer": ("Tokenizer",),
    "errors": ("UserError",),
    "fields": ("override",),
    "metrics": ("MetricsConfig", "MetricWriter"),
    "models.config": ("ComputeConfig", "DecoderConfig"),
    "models.decoder": ("Decoder",),
    "nn.lora": ("LoRAConfig",),
    "nn.rope": ("RopeScaling",),
    "nn.router": ("MoEConfig",),
    "nn.stack": ("Remat",),
    "picture": ("draw_mesh",),
    "pretrained": ("Pretrained", "load_model", "open_model", "split_location"),
    "serve.config": ("EngineConfig",),
    "serve.engine": ("Engine",),
    "serve.generate": ("Generator", "generate", "generate_text"),
    "serve.request": ("Constraint", "QueueFull", "SamplingConfig", "TokenLogprobs"),
    "sharding": ("MeshConfig", "Rules", "make_mesh", "simulate_devices"),
    "train.evaluate": ("EvalConfig",),
    "train.loop": ("LoopConfig",),
    "train.optimizer": ("OptimizerConfig", "make_optimizer"),
    "train.program": ("batch_sharding", "compile_step", "make_state"),
    "train.step": ("TrainState", "init_state", "train_step"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxgen.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
