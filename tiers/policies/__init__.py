"""Cache policies, one a file. `registry` opens them by name; `kvstore.tiers.policy` is their contract."""
