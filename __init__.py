"""DeltaNet for Transformers: a linear transformer with the delta rule (arXiv 2406.06484)."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_deltanet import DeltaNetCacheLayer, use_state_dtype
from .configuration_deltanet import DeltaNetConfig
from .modeling_deltanet import (
    DeltaNetForCausalLM,
    DeltaNetForSequenceClassification,
    DeltaNetForTokenClassification,
    DeltaNetModel,
    DeltaNetPreTrainedModel,
)

__version__ = "0.1.0"

# The reference registers the same model type; whichever package is imported last owns the Auto classes.
AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig, exist_ok=True)
AutoModel.register(DeltaNetConfig, DeltaNetModel, exist_ok=True)
AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DeltaNetConfig, DeltaNetForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DeltaNetConfig, DeltaNetForTokenClassification, exist_ok=True)

__all__ = [
    "DeltaNetCacheLayer",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetForSequenceClassification",
    "DeltaNetForTokenClassification",
    "DeltaNetModel",
    "DeltaNetPreTrainedModel",
    "use_state_dtype",
]
