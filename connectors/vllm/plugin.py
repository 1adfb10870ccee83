"""Makes the connector known to vLLM by its name; the entry point `vllm.general_plugins` calls `register`."""

from __future__ import annotations

NAME = "KVStoreConnector"
MODULE = "kvstore.connectors.vllm.connector"


def register() -> None:
    """Register the connector. May be called several times in a process, as vLLM does."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
