"""What vLLM calls in each of its processes. Light: it runs whatever model is served, and imports no layer."""

from packaging.specifiers import SpecifierSet
from transformers import AutoConfig

from ..configuration_deltanet import DeltaNetConfig

ARCHITECTURE = "DeltaNetForCausalLM"
VERSIONS = ">=0.32,<0.33"
"""Of vLLM. The plugin uses parts that change between releases, and was tested with these."""


def version_refusal(version: str) -> str:
    """Why the plugin does not work with this version of vLLM; empty where it does."""
    if SpecifierSet(VERSIONS).contains(version, prereleases=True):
        return ""
    return f"The vLLM plugin of deltanet is for vLLM {VERSIONS}, and vLLM {version} is installed."


class ServedConfig(DeltaNetConfig):
    """How vLLM reads a configuration: as a `DeltaNetConfig`, and only where this vLLM can serve it."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Raises `RuntimeError` for a vLLM outside `VERSIONS`, here so that other models are still served."""
        import vllm

        if refusal := version_refusal(vllm.__version__):
            raise RuntimeError(refusal)
        # Where the norms of a layer belong to in the layout of 2024 is a matter of names, which `weights.py` knows.
        fields = {key: value for key, value in config_dict.items() if key != "norm_first"}
        return DeltaNetConfig.from_dict(fields, **kwargs)


def register() -> None:
    """Make vLLM know the architecture; vLLM may call this several times."""
    import vllm

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    if version_refusal(vllm.__version__):
        return  # said when a DeltaNet is asked for
    from vllm import ModelRegistry

    from .options import register_options

    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
    register_options(ServedConfig.model_type, ARCHITECTURE)
