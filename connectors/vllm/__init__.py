"""The vLLM connector; `kvstore.connectors.vllm.connector` has the class, docs/engines.md says how to use it.

`planning` decides on the scheduler's side what to load and save, `transfers` does it on each worker's side, `paged` and
`layouts` know where vLLM keeps K and V. Only `connector`, `stats` and `plugin` import vLLM; the rest is tested without.
"""
