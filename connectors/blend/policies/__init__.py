"""Recompute policies, one a file; `kvstore.connectors.blend.registry` names them."""
