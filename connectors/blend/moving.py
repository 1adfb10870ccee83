"""K moved from the positions it was computed at to others, by the difference of the two rotations.

The angle of a token is fp32(position) * fp32(inverse frequency), rounded to fp32, as engines compute it. What a key is
turned by is the difference of the two angles, taken in float64, so that the moved key has the very angle that the
engine would have given it. The turn itself is done in fp32 and rounded to the dtype of the model once: move from the
stored original, never a moved key again. With yarn K carries the attention factor, and a turn by a difference keeps it
(undoing the rotation and doing it again would divide by the factor's square and multiply by it twice).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvstore.codecs.rotary import inverse_frequencies, rotated_part
from kvstore.errors import UnsupportedModelError
from kvstore.spec import KVSpec


class KeyMover:
    """Moves K of one model.

    Args:
        spec: geometry and rope of the model.
        frequencies: radians a position of every pair as the model has them, (dims / 2,); None to work them out. The two
            may differ in the last bit, which far from the beginning is seen.

    Raises:
        UnsupportedModelError: its rope cannot be moved; names the kind.
    """

    def __init__(self, spec: KVSpec, frequencies: torch.Tensor | None = None) -> None:
        own = inverse_frequencies(spec.rope) if rotated_part(spec) == 0 else None
        if own is None:
            raise UnsupportedModelError(
                f"rope {spec.rope.kind!r} with these parameters cannot be moved to other positions; "
                "reuse its KV in place only"
            )
        self._frequencies = own if frequencies is None else frequencies.detach().float().cpu().numpy()

    def move(self, keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """K at the positions `new`, in its own dtype; the tensor itself if nothing moves.

        Args:
            keys: K as it was computed at the positions `old`, (heads, tokens, dim).
            old: positions, (tokens,) integers.
            new: likewise.
        """
        if torch.equal(old, new):
            return keys
        turn = self._angles(new) - self._angles(old)
        cosine = torch.from_numpy(np.cos(turn).astype(np.float32)).to(keys.device)
        sine = torch.from_numpy(np.sin(turn).astype(np.float32)).to(keys.device)
        half = len(self._frequencies)
        first, second = keys[..., :half].float(), keys[..., half : 2 * half].float()
        moved = torch.empty_like(keys)
        moved[..., :half] = first * cosine - second * sine
        moved[..., half : 2 * half] = second * cosine + first * sine
        moved[..., 2 * half :] = keys[..., 2 * half :]
        return moved

    def _angles(self, positions: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return (positions.cpu().numpy().astype(np.float32)[:, None] * self._frequencies).astype(np.float64)


def mover_of(model: PreTrainedModel, spec: KVSpec) -> KeyMover:
    """Moves K with the very frequencies that the model has. Raises UnsupportedModelError as `KeyMover` does."""
    base: Any = model.base_model
    return KeyMover(spec, base.rotary_emb.inv_freq)
