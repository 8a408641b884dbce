"""DeltaNet in vLLM. The entry point `vllm.general_plugins` makes vLLM call `plugin.register`; no other import is needed."""
