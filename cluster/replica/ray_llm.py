"""Imports Ray Serve LLM in several processes at once.

On import Ray (2.60, ray/llm/_internal/serve/engines/vllm/kv_transfer/factory.py) enters its KV connectors in a registry
that all processes of the cluster share: it asks for each whether it is there, and then enters it, which fails if it is
there by now. Of two replicas that start together, one would fail. What made it fail is there at the next attempt.
"""

import importlib

FACTORY = "ray.llm._internal.serve.engines.vllm.kv_transfer.factory"
ATTEMPTS = 10
"""Each failure is of another connector, and there are four."""


def import_registry() -> None:
    """Import what enters the connectors, so that what imports it later finds it done. Raises what the import raises."""
    for _ in range(ATTEMPTS - 1):
        try:
            importlib.import_module(FACTORY)
            return
        except ValueError as error:
            if "is already registered" not in str(error):
                raise
    importlib.import_module(FACTORY)
