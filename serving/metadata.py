"""How vLLM describes a batch to the delta-rule layers."""

from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)


class BatchBuilder(ShortConvAttentionMetadataBuilder):
    # Tables for a Triton convolution of vLLM's own.
    needs_causal_conv1d_metadata = False


class BatchBackend(ShortConvAttentionBackend):
    """Slots of the states, boundaries and what is new: that of vLLM's convolution layers, which is all we need."""

    @staticmethod
    def get_name() -> str:
        return "DELTANET"

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder


Batch = ShortConvAttentionMetadata
"""Decoding requests first, then prompts: `num_decode_tokens`, `state_indices_tensor_d` [decodes, 1]; `num_prefill_tokens`,
`state_indices_tensor_p` [prompts], `query_start_loc_p` [prompts + 1], `has_initial_states_p` [prompts]."""
