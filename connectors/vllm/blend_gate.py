"""Whether a model may be blended in vLLM: what `kvstore gate --blend` has found on the same weights in transformers.

The measurement is of the weights and the policy; vLLM's layers compute the same numbers but for rounding. A record
names the model by its fingerprint in transformers, which is not what vLLM's weights are named by, so the operator says
which one it is (`blend.gated_as`).
"""

from __future__ import annotations

from kvstore import blend_records
from kvstore.blend_gate import PURPOSES
from kvstore.connectors.blend.passing import BlendPass, command
from kvstore.connectors.vllm.blend_settings import BlendSettings
from kvstore.errors import ConfigError


def check_gate(settings: BlendSettings, dtype: str) -> None:
    """See that the policy of these settings has passed the gate on the model that they name, which runs in `dtype`.

    Raises:
        ConfigError: it has not, or they name none; says how to get a pass.
    """
    if settings.ungated:
        return
    policy = settings.chosen()
    remedy = (
        f"run {command(policy, '', dtype)} on the same weights and set blend.gated_as to the fingerprint in its "
        "record, or set blend.ungated to true"
    )
    if not settings.gated_as:
        raise ConfigError(f"blend.gated_as is empty, so nothing says that blending is good enough here: {remedy}")
    records = blend_records.load_all()
    model = bytes.fromhex(settings.gated_as)
    verdict = BlendPass(records, model, policy, PURPOSES[settings.purpose]).verdict
    if not verdict.passed:
        raise ConfigError(f"blend.gated_as: {verdict.reason}; {remedy}")
